"""Forward passes as pure functions: decoder, draft heads, their layers, and expert kernels. Private."""
