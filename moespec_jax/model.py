"""A loaded model, ready to generate: what `moespec_jax.load` returns.

import moespec_jax
model = moespec_jax.load()                      # the embedded model; or a directory, or a hub id
print(model.generate("def fibonacci(n):").prompts[0].text)
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from moespec_jax.backend import Backend, default_backend
from moespec_jax.checkpoint import CheckpointError, Placement, load_config, load_parameters
from moespec_jax.config import DecoderConfig
from moespec_jax.decode import (
    DecodeState,
    Settings,
    begin,
    bucket_lengths,
    decode_steps,
    empty_prefill,
    prefill_chunk,
)
from moespec_jax.decoder import Decoder
from moespec_jax.hub import locate
from moespec_jax.programs import Programs
from moespec_jax.sample import SamplingConfig
from moespec_jax.text import load_tokenizer, read_stop_ids

DEMO_TARGET = str(Path(__file__).parent / "demo" / "target")
SMALLEST_CACHE = 256
_STREAM_INTERVAL_S = 0.1
_STOP_SLOTS = 8
# Takes each sequence's new token ids, as often as they arrive.
OnTokens = Callable[[list[list[int]]], None]


class RequestError(ValueError):
    """A request that this model cannot serve: what was expected and what came."""


@dataclasses.dataclass
class PromptResult:
    """What one prompt gave. Text fields are None where there is no tokenizer.

    `finish_reason` is "stop" (a stop id, which is the last of `token_ids`), "length" (`max_new_tokens`) or "context".
    `rounds` counts forward passes after prefill; plain decoding accepts one token in each.
    """

    text: str | None
    token_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    accept_length: float
    accepted_by_depth: list[float]
    finish_reason: str


@dataclasses.dataclass
class RunResult:
    """What one batch gave, and how long each part took in seconds. `tokens_per_s` counts tokens after the first of each
    sequence over `decode_s`; compilation is in neither."""

    prompts: list[PromptResult]
    experts_wanted: float
    experts_loaded: float
    mass_kept: float
    tokens_replaced: float
    exact: bool
    budget: dict[str, Any] | None
    tree: dict[str, Any] | None
    compile_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    device: str
    dtype: str
    versions: dict[str, str]


@dataclasses.dataclass
class Model:
    """A decoder with its tokenizer, stop ids and compiled programs."""

    config: DecoderConfig
    params: Decoder
    backend: Backend
    dtype: jnp.dtype
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    directory: Path
    programs: Programs = dataclasses.field(default_factory=Programs)

    def __post_init__(self) -> None:
        # One function object for the life of the model: compiled programs are found by it.
        self._compute = self.backend.compute(self.config.hidden_act)

    def encode(self, prompt: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text prompt, with the special tokens the tokenizer adds unless told otherwise."""
        if self.tokenizer is None:
            raise RequestError(f"expected token ids (--prompt-ids): {self.directory} has no tokenizer")
        if any(
            "\ud800" <= c <= "\udfff" for c in prompt
        ):  # how Python spells bytes of a command line that are no UTF-8
            raise RequestError(f"expected a prompt of valid UTF-8 text, got {prompt[:40]!r}")
        return self.tokenizer.encode(prompt, add_special_tokens=special_tokens).ids

    def decode(self, token_ids: Sequence[int], after: Sequence[int] = ()) -> str | None:
        """Text of token ids without special tokens; None without a tokenizer.

        `after` are the ids before them in the sequence: some tokenizers drop a leading space of what they see first.
        """
        if self.tokenizer is None:
            return None
        before = self.tokenizer.decode(list(after), skip_special_tokens=True)
        whole = self.tokenizer.decode([*after, *token_ids], skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
        max_length: int | None = None,
        on_tokens: OnTokens | None = None,
    ) -> RunResult:
        """Continue one or several prompts, given as text or as token ids, as one batch.

        `on_tokens` is called with every sequence's new ids, about ten times a second or once a token if that is slower.

        Raises:
            RequestError: a prompt is empty, holds an unknown id or fills the context, or a number is out of range.
        """
        try:
            sampling = SamplingConfig(temperature, top_k, top_p)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if not 0 <= seed < 2**32:
            raise RequestError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")
        given = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.encode(p) if isinstance(p, str) else list(p) for p in given]
        limit = self._limits(ids, max_new_tokens, max_length)
        stops = () if ignore_eos else self.stop_ids
        run = _Run(self, Settings(self.config, sampling, self._compute), ids, limit, stops, seed)
        run.execute(on_tokens)
        return run.result(max_new_tokens, stops)

    def _limits(self, ids: list[list[int]], max_new_tokens: int, max_length: int | None) -> list[int]:
        """The length at which each sequence ends at the latest."""
        context = self.config.max_position_embeddings
        if not ids:
            raise RequestError("expected at least one prompt")
        if max_new_tokens < 1:
            raise RequestError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        if max_length is not None and not 1 < max_length <= context:
            raise RequestError(f"expected max_length from 2 to the model's context of {context}, got {max_length}")
        context = max_length or context
        for number, prompt in enumerate(ids):
            if not prompt:
                raise RequestError(f"expected a prompt of at least one token; prompt {number} is empty")
            if len(prompt) >= context:
                raise RequestError(
                    f"expected a prompt shorter than the context of {context} tokens; prompt {number} has {len(prompt)}"
                )
            for i in prompt:
                if not 0 <= i < self.config.vocab_size:
                    raise RequestError(
                        f"expected token ids from 0 to {self.config.vocab_size - 1}; prompt {number} holds {i}"
                    )
        return [min(len(prompt) + max_new_tokens, context) for prompt in ids]


def load(
    model: str = DEMO_TARGET,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: DTypeLike | None = None,
    backend: Backend | None = None,
    placement: Placement | None = None,
    progress: bool = False,
) -> Model:
    """Load a directory (Hugging Face or converted to orbax) or a hub id; without arguments, the embedded model.

    The dtype defaults to float32 on CPU, which converts bfloat16 weights at every use, and to bfloat16 elsewhere.

    Raises:
        CheckpointError: there is no such model, or it is not one we can run; the message says what is wrong and where.
    """
    directory = locate(model, revision, offline, progress)
    config = load_config(directory)
    backend = backend or default_backend()
    kind = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    tokenizer, stop_ids = load_tokenizer(directory), read_stop_ids(directory)
    tokens = 0 if tokenizer is None else tokenizer.get_vocab_size()
    if tokens > config.vocab_size:
        raise CheckpointError(
            f"expected a tokenizer of at most {config.vocab_size} tokens; it has {tokens} ({directory})"
        )
    params = load_parameters(directory, config, backend, kind, placement, progress)
    return Model(config, params, backend, kind, tokenizer, stop_ids, directory)


class _Run:
    """One batch on its way through the compiled programs."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        ids: list[list[int]],
        limit: list[int],
        stops: tuple[int, ...],
        seed: int,
    ):
        self.model, self.settings, self.ids, self.limit = model, settings, ids, limit
        # No id is -1. Padded, so that neither `ignore_eos` nor a few more stop ids compile anything anew.
        self.stops = jnp.asarray([*stops, *[-1] * (_STOP_SLOTS - len(stops))], jnp.int32)
        self.key = jax.random.key(seed)
        self.compile_before = model.programs.compile_s
        self.prefill_s = self.decode_s = 0.0
        self.rounds, self.wanted = 0, 0.0
        self.sequences = ids

    def execute(self, on_tokens: OnTokens | None) -> None:
        state = self._prefill()
        self._collect(state, on_tokens)
        while not bool(jnp.all(state.done)):
            steps = jnp.int32(self._steps_per_call() if on_tokens else max(self.limit))
            state, info = self._timed("decode_s", decode_steps, state, steps, donate=(1,))
            self.rounds += int(info.rounds)
            self.wanted += float(info.experts_wanted)
            self._collect(state, on_tokens)

    def _steps_per_call(self) -> int:
        """As many steps as fit between two looks of a reader; one at first, to learn how long a step takes."""
        return max(1, int(_STREAM_INTERVAL_S * self.rounds / self.decode_s)) if self.rounds else 1

    def _prefill(self) -> DecodeState:
        model, lengths = self.model, np.array([len(p) for p in self.ids], np.int32)
        chunks = bucket_lengths(int(lengths.max()))
        slots = max(SMALLEST_CACHE, 1 << (max(self.limit) - 1).bit_length(), sum(chunks))
        tokens = np.zeros((len(self.ids), slots), np.int32)
        for row, prompt in zip(tokens, self.ids, strict=True):
            row[: len(prompt)] = prompt
        prefill = empty_prefill(model.config, len(self.ids), slots, model.dtype, stacked=model.backend.stacked)
        start, prompt_lengths = 0, jnp.asarray(lengths)
        for chunk in chunks:
            part = jnp.asarray(tokens[:, start : start + chunk])
            prefill = self._timed(
                "prefill_s", prefill_chunk, prefill, part, jnp.int32(start), prompt_lengths, donate=(1,)
            )
            start += chunk
        limit = jnp.asarray(np.array(self.limit, np.int32))
        rest = (jnp.asarray(tokens), prompt_lengths, limit, self.stops, self.key)
        return self._timed("prefill_s", begin, prefill.cache, prefill.last_hidden, *rest, donate=(1, 3))

    def _timed(self, clock: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...]) -> Any:
        compiled, started = self.model.programs.compile_s, time.perf_counter()
        out = self.model.programs.run(function, self.settings, self.model.params, *arguments, donate=donate)
        jax.block_until_ready(out)
        spent = time.perf_counter() - started - (self.model.programs.compile_s - compiled)
        setattr(self, clock, getattr(self, clock) + spent)
        return out

    def _collect(self, state: DecodeState, on_tokens: OnTokens | None) -> None:
        tokens, length = np.asarray(state.tokens), np.asarray(state.length)
        sequences = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
        if on_tokens:
            on_tokens([new[len(old) :] for new, old in zip(sequences, self.sequences, strict=True)])
        self.sequences = sequences

    def result(self, max_new_tokens: int, stops: tuple[int, ...]) -> RunResult:
        prompts = [self._prompt_result(i, max_new_tokens, stops) for i in range(len(self.ids))]
        later = sum(p.new_tokens - 1 for p in prompts)
        experts = self.wanted / self.rounds if self.rounds else 0.0
        return RunResult(
            prompts=prompts,
            experts_wanted=experts,
            experts_loaded=experts,
            mass_kept=1.0,
            tokens_replaced=0.0,
            exact=True,
            budget=None,
            tree=None,
            compile_s=self.model.programs.compile_s - self.compile_before,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            tokens_per_s=later / self.decode_s if self.decode_s else 0.0,
            device=f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})",
            dtype=str(self.model.dtype),
            versions=_versions(),
        )

    def _prompt_result(self, i: int, max_new_tokens: int, stops: tuple[int, ...]) -> PromptResult:
        new = self.sequences[i][len(self.ids[i]) :]
        reason = "stop" if new[-1] in stops else "length" if len(new) == max_new_tokens else "context"
        rounds = len(new) - 1
        text = self.model.decode(new, after=self.ids[i])
        return PromptResult(text, new, len(self.ids[i]), len(new), rounds, 1.0 if rounds else 0.0, [], reason)


def _versions() -> dict[str, str]:
    import importlib.metadata

    import moespec_jax

    names = ("jax", "jaxlib", "flax", "transformers")
    # Our own from the source: a checkout that was never installed has no metadata.
    return {name: importlib.metadata.version(name) for name in names} | {"moespec_jax": moespec_jax.__version__}
