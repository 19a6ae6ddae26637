"""Training of EAGLE-3 draft heads for any supported target: `python -m moespec_jax.train`."""
