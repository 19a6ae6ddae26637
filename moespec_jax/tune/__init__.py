"""Search for the fastest tree and budget on a model, a device and prompts: `python -m moespec_jax.tune`."""
