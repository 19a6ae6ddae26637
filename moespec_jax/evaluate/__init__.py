"""Quality: how close to the exact target, how well it answers, and any task of lm-evaluation-harness."""
