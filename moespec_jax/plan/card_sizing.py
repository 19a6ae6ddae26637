"""Rows of the sizing table for NVIDIA cards: memory and floors of a model on one card or several of a machine.

Sizes of weights, head and caches need no compiler. Temporaries do, and are those of programs of a model's first
layers: the layers of a program use the same memory one after another.
"""

import dataclasses
import functools
import importlib.util
from typing import Any, cast

from jax.sharding import AbstractMesh, Mesh

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.autoregressive import PREFILL_CHUNK
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.nn.backend import Backend, default_backend
from moespec_jax.nn.quantization import Quantization
from moespec_jax.parallel.mesh import AXES, MeshConfig, make_mesh, shard_decoder, ways
from moespec_jax.plan.abstract import with_layers
from moespec_jax.plan.cards import CARDS, Card, machine, parse_machine
from moespec_jax.plan.floors import floors
from moespec_jax.plan.program import Load, Round, abstract_round, lower_prefill, lower_round, mesh_for, workload

LAYERS = 4
# Shares of a card's memory that JAX reserves: by default, and with `XLA_CLIENT_MEM_FRACTION=.95`.
SHARES = (0.75, 0.95)
# Share that is kept free where temporaries are not known, at least (`_free`).
MARGIN = 0.05


def has_compiler() -> bool:
    """Test whether the CUDA compiler is installed."""
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, plugins))


def size_up_cards(load: Load, name: str, quantization: Quantization | None) -> dict[str, Any]:
    """Compute a row of the table. Sizes are bytes of one card; `memory` is their sum, without temporaries where they
    are not known: a model fits then if some memory is left for them.

    Raises:
        RequestError: there is no such card.
        ValueError: the model cannot be sharded over so many cards.
    """
    kind, count = parse_machine(name)
    card, mesh = CARDS[kind], mesh_for(load, count)
    backend = default_backend(card)
    round_ = _abstract(load, mesh, backend, quantization)
    weights, head, state = map(local_bytes, (round_.params.target, round_.params.draft, round_.state))
    held = weights + head + state
    fits = share_of(held, card) is not None
    # Compiled only where weights and caches fit.
    compiled = _temporaries(load, mesh, card.described, backend, quantization) if fits and has_compiler() else None
    memory = held + (compiled or 0)
    share = share_of(memory, card, _free(load, mesh, card) if compiled is None else 0)
    row = {
        "cards": machine(kind, count), "devices": mesh.devices, "mesh": str(mesh),
        "experts": quantization or "bfloat16",
        "fits": share is not None, "memory_fraction": share, "memory": memory, "available": card.memory,
        "weights": weights, "head": head, "cache": state, "temporaries": compiled,
        "compiled_for": None if compiled is None else card.described,
    }  # fmt: skip
    return row | (floors(load, round_, mesh, card.bandwidth * 1e9) if share is not None else {})


def share_of(memory: int, card: Card, free: int = 0) -> float | None:
    """Find the least of `SHARES` of a card's memory that holds `memory` bytes and `free` more; None where none does."""
    return next((share for share in SHARES if memory + free <= share * card.memory), None)


def _free(load: Load, mesh: MeshConfig, card: Card) -> int:
    """Compute the bytes to keep free for temporaries: a share of the card, or twice the scores of attention, float32,
    of a chunk of every prompt."""
    chunk, heads = min(PREFILL_CHUNK, load.slots // 2), load.target.num_attention_heads
    rows = load.batch // mesh.data * heads // ways(mesh, shard_decoder(load.target, mesh).heads) * chunk
    return max(int(MARGIN * card.memory), 2 * rows * load.slots * 4)


@functools.cache
def _abstract(load: Load, mesh: MeshConfig, backend: Backend, quantization: Quantization | None) -> Round:
    """Build a round without devices."""
    # Nothing is compiled: axes without devices serve as a mesh.
    axes = cast(Mesh, AbstractMesh(mesh.shape, AXES))
    return abstract_round(workload(load, axes, backend, quantization))


@functools.cache
def _temporaries(load: Load, mesh: MeshConfig, gpu: str, backend: Backend, quantization: Quantization | None) -> int:
    """Compile a round, and the reading of a chunk of the prompts; returns the larger temporaries of both."""
    # Imported here: the module configures JAX for compilation without devices.
    from moespec_jax.plan.cuda import described_devices, lowering_for

    devices = make_mesh(mesh, described_devices(gpu, mesh.devices))
    work = workload(_shortened(load), devices, backend, quantization)
    round_ = abstract_round(work)
    with lowering_for(gpu):
        lowered = lower_round(round_, devices), lower_prefill(round_, work, devices)
    found = [program.compile().memory_analysis() for program in lowered]
    return max(memory.temp_size_in_bytes for memory in found if memory is not None)


def _shortened(load: Load) -> Load:
    """Truncate the target of a load to its first dense layers and `LAYERS` more."""
    config = load.target
    dense = config.sparse_layers.index(True) if any(config.sparse_layers) else 0  # so many come first
    layers = min(dense + LAYERS, config.num_hidden_layers)
    target = with_layers(config, layers)
    boundaries = (
        tuple(range(len(load.draft.boundaries))) if layers < config.num_hidden_layers else load.draft.boundaries
    )
    draft = dataclasses.replace(load.draft, boundaries=boundaries)
    return load._replace(target=target, draft=draft, budget=_first_layers(load.budget, config, target))


def _first_layers(budget: BudgetConfig | None, config: DecoderConfig, fewer: DecoderConfig) -> BudgetConfig | None:
    if budget is None:
        return None
    sizes = resolve(budget, config).experts
    assert isinstance(sizes, tuple)
    return dataclasses.replace(budget, experts=sizes[: fewer.num_sparse_layers])
