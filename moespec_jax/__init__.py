"""Speculative decoding for Mixture-of-Experts models in JAX.

The public names are those of `__all__` and those used in the Python examples of the pages in docs. All other names, the
folders of this package included, are private and may change in any version.
"""

import importlib
from typing import TYPE_CHECKING

from moespec_jax import status_line

if TYPE_CHECKING:
    from moespec_jax.config import DecoderConfig, RopeConfig, TreeConfig
    from moespec_jax.decoding.budget_config import BudgetConfig, BudgetWarning
    from moespec_jax.decoding.sampling import SamplingConfig
    from moespec_jax.decoding.spec import DecodingSpec
    from moespec_jax.errors import CheckpointError, RequestError
    from moespec_jax.nn.backend import BACKENDS, Backend
    from moespec_jax.parallel.mesh import MeshConfig
    from moespec_jax.runtime.load import load
    from moespec_jax.runtime.model import Model
    from moespec_jax.runtime.profile_costs import read_costs
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
    "read_costs",
    "read_profile",
]

# JAX takes seconds to import: a command shows first that it starts, and a name is imported when it is used.
status_line.begin_command()

_MODULES = {
    "config": ["DecoderConfig", "RopeConfig", "TreeConfig"],
    "decoding.budget_config": ["BudgetConfig", "BudgetWarning"],
    "decoding.sampling": ["SamplingConfig"],
    "decoding.spec": ["DecodingSpec"],
    "errors": ["CheckpointError", "RequestError"],
    "nn.backend": ["BACKENDS", "Backend"],
    "parallel.mesh": ["MeshConfig"],
    "runtime.load": ["load"],
    "runtime.model": ["Model"],
    "runtime.profile_costs": ["read_costs"],
    "runtime.results": ["PromptResult", "RunResult"],
    "runtime.tuned_profile": ["read_profile"],
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
