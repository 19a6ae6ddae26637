"""Least milliseconds of a token and of a round on cards: the bytes of the weights that must be read, over the published
bandwidth of the memory. Floors, not measurements: caches, communication and computation add to them."""

import math

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.measure.roofline import verification_bytes
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.parallel.mesh import MeshConfig
from moespec_jax.plan.program import Load, Round


def floors(load: Load, round_: Round, mesh: MeshConfig, bandwidth: float) -> dict[str, float | list[float]]:
    """Compute the columns: milliseconds of a token in plain decoding; and of a round, with the fewest experts that its
    tokens can select together and with the most, or those of the budget.

    Args:
        load: the settings.
        round_: parameters as they are sharded.
        mesh: devices.
        bandwidth: bytes per second of one card.
    """
    params, least = round_.params, load.target.num_experts_per_tok
    passes = (load.tree.depth + 1) * _level_bytes(params.draft) + local_bytes(params.draft.fc)
    most = _most_experts(load.target, load.budget, load.batch // mesh.data * load.tree.size)
    token, fullest = (pass_bytes(load.target, params.target, mesh, experts) for experts in (least, most))
    read = (token, token + passes, fullest + passes)
    token_ms, *round_ms = (float(f"{size / bandwidth * 1e3:.4g}") for size in read)
    return {"token_floor_ms": token_ms, "round_floor_ms": round_ms}


def pass_bytes(config: DecoderConfig, target: Decoder, mesh: MeshConfig, experts: float) -> float:
    """Compute the bytes that one device must read for a forward pass over a few tokens: those of
    `roofline.verification_bytes`, with the least share of a layer's `experts` that the busiest device can have."""
    return verification_bytes(config, target, math.ceil(experts / mesh.expert) * mesh.expert)


def _level_bytes(head: DraftHead) -> int:
    """Count the bytes of a head that every level of a tree reads."""
    return local_bytes(head) - local_bytes((head.fc, head.embed, head.target_ids))


def _most_experts(config: DecoderConfig, budget: BudgetConfig | None, tokens: int) -> int:
    """Count the experts that tokens can select in a layer: the most over layers under a budget."""
    selected = min(tokens * config.num_experts_per_tok, config.num_experts)
    if budget is None:
        return selected
    sizes = resolve(budget, config).experts
    assert isinstance(sizes, tuple)
    return min(selected, int(max(sizes)))
