"""Optimizers of the head: AdamW as in EAGLE, or Muon for matrices as in speculators."""

# optax types parameters as arrays and containers; it accepts trees of dataclasses too.
# pyright: reportArgumentType=false

import dataclasses
from typing import Literal

import jax
import optax

from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.nn.eagle3 import DraftHead


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule: linear warm-up, constant, then decay.

    Fields:
        steps: number of all steps. In a run that is extended, the schedule of the larger number holds from then on.
        name: `adamw`, or `muon`: Muon for matrices, AdamW for all other parameters.
        learning_rate: peak; under Muon, of matrices.
        adam_learning_rate: peak of all other parameters under Muon.
        warmup_steps: length of the warm-up.
        schedule: shape of the decay.
        decay_from: share of all steps after which the decay begins, if the warm-up has ended.
        final: final learning rate as a fraction of the peak.
        clip: largest global norm of the gradient.
    """

    steps: int
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 5e-5
    adam_learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: Literal["linear", "cosine"] = "linear"
    decay_from: float = 0.0
    final: float = 0.0
    clip: float = 0.5


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Build the optimizer: the gradient's global norm is clipped first; there is no weight decay (EAGLE-3's recipe)."""
    update = {"adamw": _adamw, "muon": _muon}[config.name](config)
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.adamw(_schedule(config, config.learning_rate), b1=0.9, b2=0.95, weight_decay=0.0)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.contrib.muon(
        _schedule(config, config.learning_rate),
        adam_learning_rate=_schedule(config, config.adam_learning_rate),
        adam_b2=0.95,
        weight_decay=0.0,
        adam_weight_decay=0.0,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )


def _schedule(config: OptimizerConfig, peak: float) -> optax.Schedule:
    begin = max(config.warmup_steps, round(config.decay_from * config.steps))
    rest = max(config.steps - begin, 1)
    warm = optax.linear_schedule(0.0, peak, config.warmup_steps)
    linear = optax.linear_schedule(peak, config.final * peak, rest)
    cool = linear if config.schedule == "linear" else optax.cosine_decay_schedule(peak, rest, config.final)
    return optax.join_schedules([warm, optax.constant_schedule(peak), cool], [config.warmup_steps, begin])


def _matrices(head: DraftHead | DFlashHead) -> DraftHead | DFlashHead:
    """Mark the axes of the matrices that Muon orthogonalises: input and output of every matrix product except that of
    the output head and those of DSpark's tables of tokens and its estimate. Other parameters are None."""
    matrix = optax.contrib.MuonDimensionNumbers
    transposed = {"q", "k", "v"}  # [out, in]
    others = {"lm_head", "previous", "following", "weight"}

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = path[-1].name if hasattr(path[-1], "name") else ""
        if leaf.ndim != 2 or name in others:
            return None
        return matrix(1, 0) if name in transposed else matrix(0, 1)

    return jax.tree_util.tree_map_with_path(axes, head)
