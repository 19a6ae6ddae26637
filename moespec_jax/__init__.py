"""Speculative decoding for Mixture-of-Experts models in JAX.

The public names are those of `__all__` and those used in docs/extending.md and docs/forward_pass.md. All other names,
the folders of this package included, are private and may change in any version.
"""

from moespec_jax.config import DecoderConfig, RopeConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, BudgetWarning
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.parallel.mesh import MeshConfig
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import PromptResult, RunResult
from moespec_jax.runtime.tuned_profile import read_profile

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "Backend",
    "BudgetConfig",
    "BudgetWarning",
    "CheckpointError",
    "DecoderConfig",
    "DecodingSpec",
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
