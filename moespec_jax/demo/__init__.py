"""Embedded target and draft head: their files, and the commands that trained them."""
