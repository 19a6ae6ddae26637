"""Greedy tokens of one family on a mesh of devices beside those on one device: a program of its own, for the number of
devices is settled at its start. Prints both as JSON.

python tests/families_spread.py FAMILY none|int8|mxfp4 MESH
"""

import json
import sys
from typing import Any

import attention_models
import jax
import numpy as np
import router_models
from driver import random_tensors

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.leaves import Source, load_source
from moespec_jax.checkpoint.placement import decoder_placement, with_repeated_heads
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.parallel.mesh import make_mesh, parse_mesh
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.run import Batch, Run

FAMILIES = [*router_models.ROUTER_FAMILIES, *attention_models.FAMILIES]
PROMPTS, NEW = [[1, 2, 3, 4, 5], [7], [3, 6] * 6, [9, 8]], 16
# Sizes that four devices can share; of them, those that a family has are set.
COMMON = dict(num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, tie_word_embeddings=False)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size")


def fields_of(family: str) -> dict[str, Any]:
    """The config.json of a model of eight experts, each of a multiple of 64."""
    drawn = router_models if family in router_models.ROUTER_FAMILIES else attention_models
    fields = drawn.draw_fields(family, 1)
    values = COMMON | dict.fromkeys(EXPERTS, 8) | dict.fromkeys(WIDTHS, 64)
    changes: dict[str, Any] = {name: value for name, value in values.items() if name in fields}
    return fields | changes | dict(head_dim=8, max_position_embeddings=128)


def greedy(fields: dict[str, Any], mesh: str | None, quantization: Any) -> list[list[int]]:
    """Tokens of every sequence, prompts included."""
    config, slots = read_config(fields), BACKENDS["slots"]
    tensors = random_tensors(config, 3)
    source = Source(
        {name: np.dtype(np.float32) for name in tensors},
        lambda names: ((n, tensors[n]) for n in names),
        tensor_table(config),
    )
    devices = None if mesh is None else make_mesh(parse_mesh(mesh))
    placement = None if devices is None else decoder_placement(config, devices)
    params = load_source(source, config, slots, "float32", placement, False, quantization)
    config = config if placement is None else with_repeated_heads(config, placement)
    plain = Autoregressive(config, SamplingConfig(), slots)
    run = Run(Programs(devices), plain, params, Batch(PROMPTS, [len(p) + NEW for p in PROMPTS], (), 5))
    run.execute()
    return run.sequences


def main() -> None:
    """Decode on one device and on the mesh."""
    family, quantization, mesh = sys.argv[1:]
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_default_matmul_precision", "highest")
    fields, kind = fields_of(family), None if quantization == "none" else quantization
    print(json.dumps({"one": greedy(fields, None, kind), "mesh": greedy(fields, mesh, kind)}))


if __name__ == "__main__":
    main()
