"""How the states of decoding lie on a mesh: which axes split which dimension, as trees of `PartitionSpec`.

Everything that belongs to one sequence is where the sequence is; caches are split by heads too, as attention is. What
is about the whole batch is the same on every device.
"""

# States are typed as trees of arrays.
# pyright: reportArgumentType=false

from jax.sharding import PartitionSpec as P

from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.autoregressive import DecodeInfo, DecodeState, PrefillState
from moespec_jax.decoding.round_info import RoundInfo, SpeculationInfo
from moespec_jax.decoding.speculative import SpeculationPrefill, SpeculationState
from moespec_jax.decoding.tree import Tree
from moespec_jax.nn.cache import Cache
from moespec_jax.parallel.mesh import DATA, Split

EVERYWHERE, BY_SEQUENCE = P(), P(DATA)


def cache_specs(split: Split, *, stacked: bool) -> Cache:
    """Of keys, values and lengths, with `[layers, batch, kv_heads, slots, head]` where layers are stacked."""
    store = P(*([None] if stacked else []), DATA, split.heads or None)
    return Cache(store, store, BY_SEQUENCE)


def prefill_specs(split: Split, *, stacked: bool) -> PrefillState:
    """Of plain prefill."""
    return PrefillState(cache_specs(split, stacked=stacked), BY_SEQUENCE)


def decode_specs(split: Split, *, stacked: bool) -> DecodeState:
    """Of plain decoding."""
    specs = dict(tokens=BY_SEQUENCE, length=BY_SEQUENCE, limit=BY_SEQUENCE, done=BY_SEQUENCE)
    specs |= dict(stop_ids=EVERYWHERE, key=EVERYWHERE)
    return DecodeState(**specs, cache=cache_specs(split, stacked=stacked))


def decode_info_specs() -> DecodeInfo:
    """Of what plain decoding tells."""
    return DecodeInfo(EVERYWHERE, BY_SEQUENCE, EVERYWHERE, EVERYWHERE)


def speculation_prefill_specs(target: Split, draft: Split, *, stacked: bool) -> SpeculationPrefill:
    """Of prefill with a draft head."""
    caches = cache_specs(target, stacked=stacked), cache_specs(draft, stacked=False)
    return SpeculationPrefill(caches[0], BY_SEQUENCE, caches[1], BY_SEQUENCE)


def speculation_specs(target: Split, draft: Split, *, stacked: bool) -> SpeculationState:
    """Of speculative decoding."""
    decoding, draft_cache = decode_specs(target, stacked=stacked), cache_specs(draft, stacked=False)
    return SpeculationState(decoding, draft_cache, taps=BY_SEQUENCE, reached=EVERYWHERE)


def speculation_info_specs() -> SpeculationInfo:
    """Of what speculative decoding tells."""
    layered = P(None, DATA)
    tree, accepted = (kind(*[BY_SEQUENCE] * 3) for kind in (Tree, Accepted))
    last = RoundInfo(BY_SEQUENCE, tree, accepted, layered, layered, EVERYWHERE)
    fields = dict.fromkeys(SpeculationInfo._fields, EVERYWHERE) | {"active": BY_SEQUENCE, "accepted": BY_SEQUENCE}
    return SpeculationInfo(**fields | {"last": last})
