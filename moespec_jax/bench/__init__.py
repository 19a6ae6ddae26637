"""Benchmark of plain and speculative decoding: `python -m moespec_jax.bench`."""
