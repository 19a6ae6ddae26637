"""Measurements: scripts that make every figure in README, and their committed results."""
