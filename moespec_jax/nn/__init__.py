"""Forward passes as pure functions: the decoder, the EAGLE-3 head, and the layers and expert kernels they consist of. Private: see `moespec_jax`."""
