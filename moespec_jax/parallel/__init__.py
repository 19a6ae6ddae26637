"""Meshes, collectives inside a program on every device, and several processes as one program. Private."""
