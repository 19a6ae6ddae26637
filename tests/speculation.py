"""Speculation in tests: random heads for random targets, and whole batches decoded plainly and speculatively."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from driver import fast_jit

from moespec_jax.checkpoint.head.tensor_table import random_head
from moespec_jax.config import DecoderConfig, DraftConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.drafter import SpeculativeParams
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.waiting import HeadState
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.run import Batch, Run

GREEDY = SamplingConfig()


def draft_config(target: DecoderConfig, **changes: Any) -> DraftConfig:
    """A small head of the target's width over three of its states."""
    fields: dict[str, Any] = dict(
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size - 5,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        boundaries=(0, 1, target.num_hidden_layers),
    )
    return DraftConfig(**(fields | changes))


def small_head(config: DraftConfig, params: Decoder, seed: int = 0) -> DraftHead:
    """A random head whose guesses come from the target's own output matrix, and so are not always wrong."""
    ids = np.sort(np.random.default_rng(seed).permutation(config.vocab_size)[: config.draft_vocab_size])
    return random_head(config, params, jnp.asarray(ids, jnp.int32), jax.random.key(seed))


class FastPrograms(Programs):
    """Compiles quickly, and counts how often each function was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: dict[str, int] = {}
        self._jitted = cache(self._jit)

    def run(
        self,
        function: Any,
        settings: Any,
        params: Any,
        *arguments: Any,
        donate: bool = False,
        specs: Any = None,
    ) -> Any:
        return self._jitted(function, settings)(params, *arguments)

    def prepare(self, function: Any, settings: Any, params: Any, *arguments: Any, **options: Any) -> Any:
        return self._jitted(function, settings).eval_shape(params, *arguments)

    def _jit(self, function: Any, settings: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.traces[function.__qualname__] = self.traces.get(function.__qualname__, 0) + 1
            return function(settings, *arguments)

        return fast_jit(counted)


class Decoding(NamedTuple):
    """A method with its parameters."""

    method: Any
    params: Any


def speculating(
    config: DecoderConfig,
    params: Decoder,
    backend: Backend,
    draft: DraftConfig,
    head: DraftHead,
    tree: TreeConfig,
    sampling: SamplingConfig = GREEDY,
    simulate: float | None = None,
) -> Decoding:
    """Speculative decoding that drafts `tree` with `head`."""
    accept = accept_rule(sampling, tree.longest_path, simulate)
    method: Speculative[DraftHead, HeadState] = Speculative(
        Autoregressive(config, sampling, backend), Eagle3Drafter(draft), tree, accept
    )
    return Decoding(method, SpeculativeParams(params, head))


def plainly(config: DecoderConfig, params: Decoder, backend: Backend, sampling: SamplingConfig = GREEDY) -> Decoding:
    return Decoding(Autoregressive(config, sampling, backend), params)


def decode(
    decoding: Decoding,
    programs: Any,
    prompts: Sequence[Sequence[int]],
    new: int,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
) -> Run[Any, Any, Any]:
    """Decode a batch to `new` tokens after each prompt."""
    batch = Batch([list(p) for p in prompts], [len(p) + new for p in prompts], stop_ids, seed)
    run = Run(programs, decoding.method, decoding.params, batch)
    run.execute()
    return run
