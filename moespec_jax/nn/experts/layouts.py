"""Memory layouts of the routed experts' weights, chosen by the back-end when a model is loaded.

`PerExpert` has three arrays for each expert, because XLA:CPU copies a slice of an array. `Flat` has three arrays for
all experts of all sparse layers, indexed by `layer * num_experts + expert`: the TPU compiler fuses such an index into
the load, whereas it copies a whole layer that is sliced out first. XLA:GPU fuses the index for one token, and copies
each expert before a product of several rows; the GPU kernels of this package do not.
"""

from flax import struct
from jaxtyping import Array, Float

from moespec_jax.nn.layers import GatedMlp
from moespec_jax.nn.quantization import Mxfp4, Quantized
from moespec_jax.nn.summary import summary

# experts[sparse layer][expert]; matrices are `[in, out]`
PerExpert = tuple[tuple[GatedMlp, ...], ...]


@struct.dataclass
class Flat:
    """All experts of all sparse layers, `all` = sparse layers * experts, in order of layers, then experts. On a mesh
    that shards each layer's experts, every device has a `Flat` of its own experts.

    Fields:
        gate, up, down: matrices, `[in, out]`.
        num_experts: experts of a layer, on this device.
        gate_bias, up_bias, down_bias: rows, as are the scales of `Quantized`; None where the family has none.
    """

    gate: Float[Array, "all model ffn"] | Quantized | Mxfp4
    up: Float[Array, "all model ffn"] | Quantized | Mxfp4
    down: Float[Array, "all ffn model"] | Quantized | Mxfp4
    num_experts: int = struct.field(pytree_node=False)
    gate_bias: Float[Array, "all 1 ffn"] | None = None
    up_bias: Float[Array, "all 1 ffn"] | None = None
    down_bias: Float[Array, "all 1 model"] | None = None

    __repr__ = summary
