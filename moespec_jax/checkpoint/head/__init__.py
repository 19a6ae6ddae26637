"""Reading and writing of EAGLE-3 head checkpoints in every published format. Private."""
