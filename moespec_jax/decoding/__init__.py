"""Decoding as compiled programs: draft a tree, verify it under a budget, accept a path, plainly or speculatively. Private: see `moespec_jax`."""
