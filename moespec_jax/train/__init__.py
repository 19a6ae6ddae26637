"""Training EAGLE-3 draft heads for any target this library runs: `python -m moespec_jax.train`."""
