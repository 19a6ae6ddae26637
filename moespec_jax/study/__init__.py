"""What routing, drafting and budgets do on a model and prompts: the figures of MoE-Spec's paper and more."""
