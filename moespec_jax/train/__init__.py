"""Training of EAGLE-3, DFlash and DSpark heads for any supported target: `python -m moespec_jax.train`."""
