"""Ways to decode against each other on one device: `python -m moespec_jax.bench`."""
