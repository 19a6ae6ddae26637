"""Study of routing, draft trees and expert budgets on a model and prompts: `python -m moespec_jax.study`."""
