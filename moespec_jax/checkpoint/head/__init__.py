"""EAGLE-3 head checkpoints of every published format, in and out. Private."""
