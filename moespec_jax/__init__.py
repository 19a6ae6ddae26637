"""Speculative decoding for Mixture-of-Experts models in JAX."""

from moespec_jax.backend import BACKENDS, Backend
from moespec_jax.budget_config import BudgetConfig, BudgetWarning
from moespec_jax.checkpoint import CheckpointError
from moespec_jax.config import DecoderConfig, RopeConfig, TreeConfig
from moespec_jax.loading import load
from moespec_jax.mesh import MeshConfig
from moespec_jax.model import Model, RequestError
from moespec_jax.profile import read_profile
from moespec_jax.results import PromptResult, RunResult
from moespec_jax.sample import SamplingConfig

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "Backend",
    "BudgetConfig",
    "BudgetWarning",
    "CheckpointError",
    "DecoderConfig",
    "MeshConfig",
    "Model",
    "PromptResult",
    "RequestError",
    "RopeConfig",
    "RunResult",
    "SamplingConfig",
    "TreeConfig",
    "load",
    "read_profile",
]
