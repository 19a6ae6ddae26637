"""Memory and communication of a model on TPU slices, from ahead-of-time compilation: `python -m moespec_jax.plan`."""
