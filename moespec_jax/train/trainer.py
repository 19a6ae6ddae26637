"""Training step: state, loss and metrics of one compiled step, data-parallel over a mesh."""

# optax does not type trees of dataclasses.
# pyright: reportArgumentType=false

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import RequestError
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.processes import put_global, replicate
from moespec_jax.train.blocks import block_scores, random_anchors
from moespec_jax.train.objective import LOSSES, StepScore, run_teacher, unrolled_scores
from moespec_jax.train.optimizer import OptimizerConfig, build_optimizer
from moespec_jax.train.rows import Rows

AnyHead = DraftHead | DFlashHead


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a training run; static in compiled programs, and written to run.json.

    Fields:
        target: the target's settings.
        draft: the head's settings.
        optimizer: optimizer and schedule.
        batch: rows a step.
        length: tokens a row that the target reads.
        unroll: number of draft steps (EAGLE-3: 7).
        decay: the loss of draft step j has the weight `decay**j` (EAGLE-3: 0.8).
        loss: name in `LOSSES`.
        dtype: of the target and of arithmetic; parameters of the head are float32.
        seed: of initial parameters and of the order of rows.
        recompute: compute logits and activations of draft steps again in the backward pass, to save memory.
    """

    target: DecoderConfig
    draft: DraftConfig | DFlashConfig
    optimizer: OptimizerConfig
    batch: int = 8
    length: int = 2048
    unroll: int = 7
    decay: float = 0.8
    loss: str = "cross-entropy"
    dtype: str = "float32"
    seed: int = 0
    recompute: bool = True


@dataclasses.dataclass(frozen=True)
class BlockRecipe(Recipe):
    """Settings of the training of a DFlash head, whose draft steps (`unroll`) are the tokens of its block.

    Fields:
        anchors: number of blocks a row, at random positions that count.
    """

    anchors: int = 64


@dataclasses.dataclass(frozen=True)
class SparkRecipe(BlockRecipe):
    """Settings of the training of a DSpark head.

    Fields:
        confidence_weight: weight of the loss of the estimate of acceptance, beside that of the drafted tokens.
    """

    confidence_weight: float = 1.0


@struct.dataclass
class TrainState:
    """State between steps.

    Fields:
        head: parameters in float32, without `target_ids`, which are not trained.
        optimizer: state of the optimizer.
    """

    head: AnyHead
    optimizer: optax.OptState

    __repr__ = summary


class Metrics(NamedTuple):
    """Metrics of one batch.

    Fields:
        loss: mean over all positions, by draft step.
        accuracy: share of counted positions where the head's most probable token is the target's, by draft step.
        gradient_norm: global norm of the gradient before clipping.
        confidence_loss: mean of the loss of the estimate of acceptance, by draft step; None without one.
    """

    loss: Float[Array, " steps"]
    accuracy: Float[Array, " steps"]
    gradient_norm: Float[Array, ""]
    confidence_loss: Float[Array, " steps"] | None = None


def initial_state(recipe: Recipe, head: AnyHead, mesh: Mesh) -> TrainState:
    """Build the state before the first step, replicated over the mesh."""
    # Copied: steps donate the state, and some arrays of the head are the target's.
    head = jax.tree.map(jnp.copy, dataclasses.replace(head, target_ids=None))
    return replicate(mesh, TrainState(head, build_optimizer(recipe.optimizer).init(head)))


def data_mesh(batch: int) -> Mesh:
    """Make a mesh with one axis `data`, of the largest number of devices that divides the batch.

    Raises:
        RequestError: there are several processes, and this is not the number of all devices.
    """
    count = max(n for n in range(1, len(jax.devices()) + 1) if batch % n == 0)
    if count < len(jax.devices()) and jax.process_count() > 1:
        raise RequestError(
            f"expected a batch that the {len(jax.devices())} devices of all processes divide; got {batch}"
        )
    return Mesh(np.array(jax.devices()[:count]), ("data",))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5,))
def train_step(
    recipe: Recipe, backend: Backend, mesh: Mesh,
    target: Decoder, target_ids: Array, state: TrainState, batch: Rows,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Run one optimizer step. Every device runs target and unrolled head on its rows; gradients are averaged."""

    def shard(target: Decoder, target_ids: Array, head: AnyHead, batch: Rows):
        loss = functools.partial(_loss, recipe, backend, target, target_ids)
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(head, batch)
        return jax.lax.pmean(gradients, "data"), _over_devices(metrics)

    # shard_map, since the compiler cannot partition the loop over routed experts: each device runs its own.
    sharded = jax.shard_map(
        shard, mesh=mesh, in_specs=(P(), P(), P(), P("data")), out_specs=(P(), P()), check_vma=False
    )  # fmt: skip
    gradients, scores = sharded(target, target_ids, state.head, batch)
    updates, optimizer = build_optimizer(recipe.optimizer).update(gradients, state.optimizer, state.head)
    head = optax.apply_updates(state.head, updates)
    return TrainState(head, optimizer), _metrics(scores, _counted(recipe, batch.ids), optax.tree.norm(gradients))


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate_batch(
    recipe: Recipe, backend: Backend, target: Decoder, target_ids: Array, state: TrainState, batch: Rows
) -> list[StepScore]:
    """Compute the scores of a batch by draft step, without gradients."""
    return _loss(recipe, backend, target, target_ids, state.head, batch)[1]


def shard_batch(mesh: Mesh, batch: Rows) -> Rows:
    """Shard rows over the mesh."""
    return Rows(*(put_global(part, NamedSharding(mesh, P("data"))) for part in batch))


def finished_head(state: TrainState, target_ids: Array) -> AnyHead:
    """Return the trained head, complete for decoding."""
    return dataclasses.replace(state.head, target_ids=target_ids)


def _loss(
    recipe: Recipe, backend: Backend, target: Decoder, target_ids: Array, head: AnyHead, batch: Rows
) -> tuple[Array, list[StepScore]]:
    head = dataclasses.replace(jax.tree.map(lambda p: p.astype(recipe.dtype), head), target_ids=target_ids)
    tokens, counts = batch.ids[:, :-1], batch.counts[:, 1:]
    teacher = run_teacher(recipe.target, target, backend, recipe.draft.boundaries, target_ids, tokens)
    loss = LOSSES[recipe.loss]
    if isinstance(recipe, BlockRecipe):
        assert isinstance(recipe.draft, DFlashConfig) and isinstance(head, DFlashHead)
        # As in z-lab's and speculators' training: engines use the target's own output matrix.
        head = dataclasses.replace(head, lm_head=jax.lax.stop_gradient(head.lm_head))
        anchors = random_anchors(recipe.anchors, recipe.seed, tokens, counts)
        scores = block_scores(recipe.draft, head, target.embed, teacher, tokens, counts, anchors, loss)
    else:
        assert isinstance(recipe.draft, DraftConfig) and isinstance(head, DraftHead)
        scores = unrolled_scores(
            recipe.draft, head, target.embed, teacher, tokens, counts, recipe.unroll, loss, recipe.recompute
        )
    weighted = [recipe.decay**step * _whole_loss(recipe, score) for step, score in enumerate(scores)]
    return sum(weighted[1:], weighted[0]) / _counted(recipe, batch.ids), scores


def _whole_loss(recipe: Recipe, score: StepScore) -> Array:
    if score.confidence is None or not isinstance(recipe, SparkRecipe):
        return score.loss
    return score.loss + recipe.confidence_weight * score.confidence


def _counted(recipe: Recipe, ids: Array) -> int:
    """Number of positions of rows that a draft step is averaged over."""
    return len(ids) * recipe.anchors if isinstance(recipe, BlockRecipe) else ids[:, :-1].size


def _over_devices(scores: list[StepScore]) -> list[StepScore]:
    return jax.tree.map(lambda x: jax.lax.psum(x, "data"), scores)


def _metrics(scores: list[StepScore], size: int, gradient_norm: Array) -> Metrics:
    loss = jnp.stack([score.loss for score in scores]) / size
    accuracy = jnp.stack([score.hits / jnp.maximum(score.positions, 1.0) for score in scores])
    estimates = [score.confidence for score in scores if score.confidence is not None]
    return Metrics(loss, accuracy, gradient_norm, jnp.stack(estimates) / size if estimates else None)
