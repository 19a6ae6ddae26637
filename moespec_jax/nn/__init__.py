"""Forward passes as pure functions: decoder, EAGLE-3 head, their layers, and expert kernels. Private."""
