"""A round of speculative decoding on abstract arrays, with the shardings of a loaded model, for compilation alone."""

import dataclasses
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
from moespec_jax.decoding.autoregressive import PREFILL_CHUNK, Autoregressive
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.decoding.states import Prompts
from moespec_jax.decoding.waiting import HeadState
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.nn.quantization import Quantization
from moespec_jax.parallel.mesh import MeshConfig, best_mesh
from moespec_jax.runtime.programs import Programs

DTYPE = jnp.dtype(jnp.bfloat16)


class Load(NamedTuple):
    """Workload before the choice of devices.

    Fields:
        target: the target's settings.
        draft: the head's settings.
        tree: shape of the draft tree.
        slots: cache slots of a sequence.
        batch: number of sequences.
        budget: expert budget.
        mesh: None for the best mesh of the devices.
    """

    target: DecoderConfig
    draft: DraftConfig
    tree: TreeConfig
    slots: int
    batch: int
    budget: BudgetConfig | None
    mesh: MeshConfig | None


class Workload(NamedTuple):
    """Settings of an abstract round.

    Fields:
        target: the target's settings.
        draft: the head's settings.
        mesh: devices.
        backend: expert compute and attention.
        tree: shape of the draft tree.
        slots: cache slots of a sequence.
        batch: number of sequences.
        budget: expert budget, resolved or not.
        quantization: of the routed experts.
    """

    target: DecoderConfig
    draft: DraftConfig
    mesh: Mesh
    backend: Backend
    tree: TreeConfig
    slots: int = 4096
    batch: int = 1
    budget: BudgetConfig | None = None
    quantization: Quantization | None = None


def workload(load: Load, mesh: Mesh, backend: Backend, quantization: Quantization | None) -> Workload:
    """Complete a load by the devices that share it, their back-end and the form of the experts."""
    return Workload(
        load.target, load.draft, mesh, backend, load.tree, load.slots, load.batch, load.budget, quantization
    )  # fmt: skip


class Round(NamedTuple):
    """Method, and its arguments as shapes with shardings."""

    method: Speculative[DraftHead, HeadState]
    params: SpeculativeParams[DraftHead]
    state: SpeculationState[HeadState]


def mesh_for(load: Load, count: int) -> MeshConfig:
    """Choose the mesh of `count` devices.

    Raises:
        ValueError: the devices cannot share the model, or are too few for the requested mesh.
    """
    mesh = best_mesh(load.target, count) if load.mesh is None else load.mesh
    if mesh.devices > count:
        raise ValueError(f"expected {mesh.devices} devices for a mesh of {mesh}; there are {count}")
    if load.batch % mesh.data:
        raise ValueError(f"expected as many devices as can share the model, or a larger --batch; got a mesh of {mesh}")
    return mesh


def abstract_round(work: Workload) -> Round:
    """Build parameters and state of a round in bfloat16.

    Raises:
        ValueError: the model cannot be sharded over the mesh, or cannot have the budget.
    """
    target, head = decoder_placement(work.target, work.mesh), head_placement(work.draft, work.mesh)
    config, draft = with_repeated_heads(work.target, target), with_repeated_heads(work.draft, head)
    decoder = abstract_decoder(config, work.backend, DTYPE, target, work.quantization)
    params = SpeculativeParams(decoder, abstract_head(draft, head))
    plain = Autoregressive(config, SamplingConfig(), work.backend)
    budget = None if work.budget is None else resolve(work.budget, config)
    accept = accept_rule(SamplingConfig(), work.tree.longest_path)
    method = Speculative(plain, Eagle3Drafter(draft, work.backend), work.tree, accept, budget)
    return Round(method, params, on_mesh(work.mesh, abstract_state(method, draft, work), method.specs(params)[0]))


def lower_round(round_: Round, mesh: Mesh) -> jax.stages.Lowered:
    """Lower the loop over rounds, its state donated, for the devices of the mesh."""
    method, params, state = round_
    rounds = on_mesh(mesh, jax.ShapeDtypeStruct((), jnp.int32), PartitionSpec())
    return Programs(mesh).lower(method.step, params, state, rounds, donate=True, specs=method.specs(params))


def lower_prefill(round_: Round, work: Workload, mesh: Mesh) -> jax.stages.Lowered:
    """Lower the reading of a chunk of every prompt, of the most tokens that the caches allow, its state donated."""
    method, params, _ = round_
    prefill, chunk = method.prefill, min(PREFILL_CHUNK, work.slots // 2)
    whole = _whole_params(method, with_repeated_heads(work.draft, head_placement(work.draft, mesh)), work)
    state = jax.eval_shape(lambda params: prefill.init(params, work.batch, work.slots), whole)
    tokens = jax.ShapeDtypeStruct((work.batch, chunk + prefill.lookahead), jnp.int32)
    number, lengths = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((work.batch,), jnp.int32)
    specs = prefill.specs(params)
    given = on_mesh(mesh, (state, tokens, number, lengths), (specs, BY_SEQUENCE, PartitionSpec(), BY_SEQUENCE))
    return Programs(mesh).lower(prefill.read, params, *given, donate=True, specs=specs)


def on_mesh(mesh: Mesh, shapes: Any, specs: Any) -> Any:
    """Add shardings to shapes. `specs` is a tree of `PartitionSpec`s, each of which may apply to a whole branch."""

    def place(spec: PartitionSpec, branch: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), branch)

    return jax.tree.map(place, specs, shapes, is_leaf=lambda node: isinstance(node, PartitionSpec))


def abstract_head(draft: DraftConfig, placement: Placement | None = None) -> DraftHead:
    """Build a draft head of abstract arrays, sharded if there is a placement."""

    def leaf(path: Path, shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        sharding = None if placement is None else placement.sharding(path, shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=sharding)

    leaves = {t.path: leaf(t.path, final_shape(t), DTYPE) for t in draft_table(draft).values()}
    ids = ("target_ids",)
    head = build_head(draft, leaves | {ids: leaf(ids, (draft.draft_vocab_size,), jnp.int32)})
    return head if placement is None else dataclasses.replace(head, sharding=placement.plan)


def abstract_state(
    method: Speculative[DraftHead, HeadState], draft: DraftConfig, work: Workload
) -> SpeculationState[HeadState]:
    """Compute the shapes of the decoding state of a batch, unsharded."""

    def begin(params: SpeculativeParams[DraftHead]) -> SpeculationState[HeadState]:
        ids, stop_ids = jnp.zeros((work.batch,), jnp.int32), jnp.zeros((8,), jnp.int32)
        tokens = jnp.zeros((work.batch, work.slots), jnp.int32)
        prompts = Prompts(tokens, ids, ids, stop_ids, jax.random.key(0))
        return method.begin(params, method.prefill.init(params, work.batch, work.slots), prompts)

    return jax.eval_shape(begin, _whole_params(method, draft, work))


def _whole_params(
    method: Speculative[DraftHead, HeadState], draft: DraftConfig, work: Workload
) -> SpeculativeParams[DraftHead]:
    """Build the parameters of a round unsharded."""
    whole = abstract_decoder(method.target.config, work.backend, DTYPE, quantization=work.quantization)
    return SpeculativeParams(whole, abstract_head(draft))
