"""Model families as values."""

from moespec_jax.checkpoint.families.table import FAMILIES, read_config

__all__ = ["FAMILIES", "read_config"]
