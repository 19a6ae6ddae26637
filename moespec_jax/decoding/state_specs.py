"""Sharding of decoding states on a mesh, as trees of `PartitionSpec` in place of arrays.

Arrays of one sequence are split with the batch, caches by attention heads too; everything else is replicated.
"""

# States are typed as trees of arrays.
# pyright: reportArgumentType=false

from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.choice import Choice
from moespec_jax.decoding.logprobs import Logprobs
from moespec_jax.decoding.round_info import BudgetInfo, BudgetSums, RoundInfo, RunInfo
from moespec_jax.decoding.states import DecodeState, PrefillState
from moespec_jax.decoding.tree import Tree
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.decoder import Decoder
from moespec_jax.parallel.mesh import DATA, ShardingPlan

REPLICATED, BY_SEQUENCE, LAYERS_BY_SEQUENCE = P(), P(DATA), P(None, DATA)


def cache_specs(sharding: ShardingPlan, *, stacked: bool) -> Cache:
    """Specs of a KV cache; stacked layers have a leading axis."""
    store = P(*([None] if stacked else []), DATA, sharding.heads or None)
    return Cache(store, store, BY_SEQUENCE)


def prefill_state_specs(params: Decoder) -> PrefillState:
    """Specs of the target's prefill."""
    return PrefillState(cache_specs(params.sharding, stacked=params.stacked), BY_SEQUENCE)


def decode_state_specs(params: Decoder, *, logprobs: bool) -> DecodeState:
    """Specs of a batch of sequences, with or without log-probabilities."""
    return DecodeState(
        tokens=BY_SEQUENCE,
        length=BY_SEQUENCE,
        prompt_length=BY_SEQUENCE,
        limit=BY_SEQUENCE,
        done=BY_SEQUENCE,
        stop_ids=REPLICATED,
        key=REPLICATED,
        cache=cache_specs(params.sharding, stacked=params.stacked),
        logprobs=Logprobs(BY_SEQUENCE, BY_SEQUENCE, BY_SEQUENCE) if logprobs else None,
    )


def choice_specs() -> Choice:
    """Specs of what a run knows of the shapes of a menu."""
    return Choice(*[REPLICATED] * 7)


def expected_specs() -> Array:
    """Spec of `RoundInfo.expected`."""
    return REPLICATED  # pyright: ignore[reportReturnType]


def depth_count_specs() -> Array:
    """Spec of `SpeculationState.depth_counts`."""
    return REPLICATED  # pyright: ignore[reportReturnType]


def plain_run_info_specs() -> RunInfo:
    """Specs of the sums of plain decoding."""
    return RunInfo(REPLICATED, BY_SEQUENCE, REPLICATED, REPLICATED)


def tree_run_info_specs(*, budget: bool) -> RunInfo:
    """Specs of the sums of speculative decoding, with or without a budget."""
    last = RoundInfo(
        active=BY_SEQUENCE,
        selected=LAYERS_BY_SEQUENCE,
        read=LAYERS_BY_SEQUENCE,
        tree=Tree(BY_SEQUENCE, BY_SEQUENCE, BY_SEQUENCE),
        accepted=Accepted(BY_SEQUENCE, BY_SEQUENCE, BY_SEQUENCE),
        budget=BudgetInfo(REPLICATED, REPLICATED, REPLICATED) if budget else None,
    )
    sums = BudgetSums(REPLICATED, REPLICATED, REPLICATED)
    return RunInfo(REPLICATED, BY_SEQUENCE, REPLICATED, REPLICATED, BY_SEQUENCE, sums, last)
