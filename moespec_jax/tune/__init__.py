"""The fastest tree and budget for a model, a device and a kind of text: `python -m moespec_jax.tune`."""
