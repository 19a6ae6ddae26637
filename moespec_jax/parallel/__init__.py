"""Meshes, collectives inside a program that runs on every device, and programs of several processes. Private."""
