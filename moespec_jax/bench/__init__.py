"""Benchmark of plain and speculative decoding on one device: `python -m moespec_jax.bench`."""
