"""Expert weight layouts: how all experts of a model lie in memory, made once at load.

`PerExpert` keeps every expert's three matrices as arrays of their own, because XLA:CPU copies whatever it slices.
`Flat` keeps all experts of all sparse layers in three arrays indexed by `layer * num_experts + expert`, because the TPU
compiler fuses such an index into the load, and copies the whole layer if it is sliced out first. XLA:GPU fuses it for
one token, and copies each visited expert before a product of several rows; our GPU kernels do not.
"""

from flax import struct
from jaxtyping import Float

from moespec_jax.nn.layers import GatedMlp
from moespec_jax.nn.quantization import Matrix

# experts[sparse layer][expert]; matrices are `[in, out]`
PerExpert = tuple[tuple[GatedMlp, ...], ...]


@struct.dataclass
class Flat:
    """All experts of all sparse layers, `all` = sparse layers * experts; row `layer * num_experts + expert`. On a mesh
    that splits each layer's experts, every device has a `Flat` of those that it holds."""

    gate: Float[Matrix, "all model ffn"]
    up: Float[Matrix, "all model ffn"]
    down: Float[Matrix, "all ffn model"]
    num_experts: int = struct.field(pytree_node=False)


def flat_from_per_expert(experts: PerExpert) -> Flat:
    """The same weights stacked. Holds both copies while it runs: for tests and small models."""
    import jax.numpy as jnp

    rows = [expert for layer in experts for expert in layer]
    stack = {name: jnp.stack([getattr(row, name) for row in rows]) for name in ("gate", "up", "down")}
    return Flat(**stack, num_experts=len(experts[0]))
