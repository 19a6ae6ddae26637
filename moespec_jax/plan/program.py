"""A round of speculative decoding for devices that are not at hand: shapes without memory behind them, spread over a
mesh as a loaded model is."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moespec_jax.checkpoint.head.tensor_table import build_head, draft_table
from moespec_jax.checkpoint.parameters import abstract_decoder, final_shape
from moespec_jax.checkpoint.placement import Placement, decoder_placement, head_placement, with_repeated_heads
from moespec_jax.checkpoint.tensor_table import Path
from moespec_jax.config import DecoderConfig, DraftConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import DecodeState, Settings
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import SpeculationSettings, SpeculationState, Speculator, expected_reach
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.eagle3 import DraftHead, empty_draft_cache
from moespec_jax.nn.quantization import Quantization
from moespec_jax.runtime.method import Method, speculative_method
from moespec_jax.runtime.programs import Programs

DTYPE = jnp.dtype(jnp.bfloat16)


class Wanted(NamedTuple):
    """What is to run: a target and a head on a mesh, `batch` sequences of at most `slots` tokens, a tree, a budget."""

    target: DecoderConfig
    draft: DraftConfig
    mesh: Mesh
    backend: Backend
    tree: TreeConfig
    slots: int = 4096
    batch: int = 1
    budget: BudgetConfig | None = None
    quantization: Quantization | None = None


class Round(NamedTuple):
    """A round's method and the shapes and places of its arguments."""

    method: Method
    params: Speculator
    state: SpeculationState


def abstract_round(wanted: Wanted) -> Round:
    """Parameters and state of a round, bfloat16.

    Raises:
        ValueError: the model cannot be spread over the mesh, or cannot have the budget.
    """
    target, beside = decoder_placement(wanted.target, wanted.mesh), head_placement(wanted.draft, wanted.mesh)
    config, draft = with_repeated_heads(wanted.target, target), with_repeated_heads(wanted.draft, beside)
    decoder = abstract_decoder(config, wanted.backend, DTYPE, target, wanted.quantization)
    params = Speculator(decoder, abstract_head(draft, beside))
    settings = Settings(config, SamplingConfig(), wanted.backend.compute(config.hidden_act), wanted.backend.attention)
    rule = None if wanted.budget is None else resolve(wanted.budget, config)
    accept = accept_rule(SamplingConfig(), wanted.tree.longest_path)
    speculation = SpeculationSettings(settings, draft, wanted.tree, accept, rule)
    method = speculative_method(speculation, params, DTYPE)
    state = jax.eval_shape(partial(_state, speculation, wanted.batch, wanted.slots))
    return Round(method, params, on_mesh(wanted.mesh, state, method.specs[1]))


def lower_round(round_: Round, mesh: Mesh) -> jax.stages.Lowered:
    """The program of rounds, its state donated, to be compiled for the devices of the mesh."""
    method, params, state = round_
    rounds = on_mesh(mesh, jax.ShapeDtypeStruct((), jnp.int32), PartitionSpec())
    function = partial(method.advance, method.settings)
    return Programs(mesh).lower(function, params, state, rounds, donate=(1,), specs=method.specs[1:])


def on_mesh(mesh: Mesh, shapes: Any, specs: Any) -> Any:
    """The shapes, each placed as its `PartitionSpec` says; a spec may stand for a whole branch."""

    def place(spec: PartitionSpec, branch: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), branch)

    return jax.tree.map(place, specs, shapes, is_leaf=lambda node: isinstance(node, PartitionSpec))


def abstract_head(draft: DraftConfig, placement: Placement | None = None) -> DraftHead:
    """A head without memory behind it."""

    def leaf(path: Path, shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        sharding = None if placement is None else placement.sharding(path, shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=sharding)

    leaves = {t.path: leaf(t.path, final_shape(t), DTYPE) for t in draft_table(draft).values()}
    ids = ("target_ids",)
    head = build_head(draft, leaves | {ids: leaf(ids, (draft.draft_vocab_size,), jnp.int32)})
    return head if placement is None else dataclasses.replace(head, split=placement.split)


def _state(settings: SpeculationSettings, batch: int, slots: int) -> SpeculationState:
    """Sequences under way."""
    ids, tokens = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, slots), jnp.int32)
    cache = empty_cache(settings.target.config, batch, slots, DTYPE, stacked=True)
    decoding = DecodeState(tokens, ids, ids, ids > 0, jnp.zeros((8,), jnp.int32), jax.random.key(0), cache)
    taps = jnp.zeros((batch, settings.tree.longest_path, settings.draft.aux_size), DTYPE)
    draft_cache = empty_draft_cache(settings.draft, batch, slots, DTYPE)
    return SpeculationState(decoding, draft_cache, taps, expected_reach(settings.tree))
