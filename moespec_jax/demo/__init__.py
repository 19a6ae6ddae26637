"""The embedded model: its files, and the scripts that made them."""
