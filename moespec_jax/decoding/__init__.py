"""Decoding as compiled programs: draft a tree, verify it under a budget, accept a path. Private."""
