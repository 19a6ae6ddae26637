"""Ways to decode a batch, as the programs they are made of: plain, a token a pass; or speculative, a tree a pass."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import DecodeState, Settings, begin, decode_steps, empty_prefill, prefill_chunk
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import (
    SpeculationSettings,
    Speculator,
    begin_speculation,
    cache_margin,
    empty_speculation_prefill,
    speculation_prefill_chunk,
    speculation_rounds,
)
from moespec_jax.decoding.state_specs import (
    decode_info_specs,
    decode_specs,
    prefill_specs,
    speculation_info_specs,
    speculation_prefill_specs,
    speculation_specs,
)
from moespec_jax.nn.decoder import Decoder


class Method(NamedTuple):
    """Functions of `(settings, params, ...)` to be compiled, with what they need to know.

    `empty(batch, slots)` is the state before prefill; `read` takes a chunk of tokens and the `lookahead` tokens after
    it; `begin` draws the first token; `advance` runs a traced number of rounds; `decoding` finds the plain decode state
    in a method's own. `margin` is how many cache slots a round may write behind a sequence's last token. The donated
    arguments of `begin` count from `params` as 0. `specs` say how the results of `read`, `begin` and, with the state,
    `advance` lie on a mesh.
    """

    settings: Hashable
    prefill_settings: Hashable
    params: Any
    empty: Callable[[int, int], Any]
    read: Callable[..., Any]
    begin: Callable[..., Any]
    advance: Callable[..., Any]
    decoding: Callable[[Any], DecodeState]
    donated: tuple[int, ...]
    specs: tuple[Any, Any, Any]
    lookahead: int = 0
    margin: int = 0


def plain_method(settings: Settings, params: Decoder, dtype: DTypeLike) -> Method:
    """One token a forward pass."""

    def empty(batch: int, slots: int) -> Any:
        return empty_prefill(settings.config, batch, slots, dtype, stacked=params.stacked)

    # Prefill draws nothing: one program serves every way of sampling.
    reading = settings._replace(sampling=SamplingConfig())
    split, stacked = params.split, params.stacked
    specs = prefill_specs(split, stacked=stacked), decode_specs(split, stacked=stacked), decode_info_specs()
    return Method(
        settings, reading, params, empty,
        prefill_chunk, begin, decode_steps, lambda state: state, donated=(1, 3), specs=specs,
    )  # fmt: skip


def speculative_method(settings: SpeculationSettings, params: Speculator, dtype: DTypeLike) -> Method:
    """A tree drafted and verified in every round."""

    def empty(batch: int, slots: int) -> Any:
        return empty_speculation_prefill(settings, batch, slots, dtype, stacked=params.target.stacked)

    target = settings.target._replace(sampling=SamplingConfig())
    reading = SpeculationSettings(target, settings.draft, TreeConfig(), accept_rule(SamplingConfig(), 2))
    splits, stacked = (params.target.split, params.draft.split), params.target.stacked
    prefill, state = speculation_prefill_specs(*splits, stacked=stacked), speculation_specs(*splits, stacked=stacked)
    specs = prefill, state, speculation_info_specs()
    return Method(
        settings, reading, params, empty,
        speculation_prefill_chunk, begin_speculation, speculation_rounds, lambda state: state.decoding,
        donated=(1, 3, 5), specs=specs, lookahead=1, margin=cache_margin(settings.tree),
    )  # fmt: skip
