"""Meshes, the collectives of a program that runs on every device, and several processes as one program. Private: see `moespec_jax`."""
