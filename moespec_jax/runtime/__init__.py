"""A loaded model and its runs: loading, compiled programs, one batch from prompt to result. Private."""
