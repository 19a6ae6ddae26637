"""How the head's parameters move: EAGLE's AdamW, or Muon for matrices (as speculators trains)."""

# optax types its parameters as arrays and containers; trees of dataclasses are as good, but pyright cannot know.
# pyright: reportArgumentType=false

import dataclasses
from typing import Literal

import jax
import optax

from moespec_jax.nn.eagle3 import DraftHead


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Peak learning rate (of matrices under Muon, whose `adam_learning_rate` moves the rest), linear warm-up, then
    constant until the share `decay_from` of all steps, then linear or cosine decay to `final` times the peak."""

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
    """The gradient's norm is clipped first; nothing decays weights (EAGLE-3's recipe)."""
    move = {"adamw": _adamw, "muon": _muon}[config.name](config)
    return optax.chain(optax.clip_by_global_norm(config.clip), move)


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


def _matrices(head: DraftHead) -> DraftHead:
    """Which axes form the matrix that Muon orthogonalises: input and output of every product but the output head."""
    matrix = optax.contrib.MuonDimensionNumbers
    inward = {"q", "k", "v"}  # kept `[out, in]`

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = path[-1].name if hasattr(path[-1], "name") else ""
        if leaf.ndim != 2 or name == "lm_head":
            return None
        return matrix(1, 0) if name in inward else matrix(0, 1)

    return jax.tree_util.tree_map_with_path(axes, head)
