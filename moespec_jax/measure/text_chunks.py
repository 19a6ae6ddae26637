"""Texts read by the target in chunks, as prompts are: the memory is that of a chunk and of the cache, however long they
are. On a mesh, its devices share the texts."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from moespec_jax.decoding.autoregressive import SMALLEST_BUCKET, TargetPrefill, bucket_lengths
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.decoding.states import PrefillState
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.layers import apply_norm
from moespec_jax.parallel.processes import fetch
from moespec_jax.runtime.padding import in_rows, padded
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.run import SMALLEST_CACHE


class Chunk(NamedTuple):
    """A chunk of every text.

    Fields:
        span: its positions.
        tokens: its tokens and the one after, `[texts, chunk + 1]`.
        start: the first position, on the devices.
    """

    span: slice
    tokens: Array
    start: Array


class TextChunks:
    """The chunks of some texts; texts of one empty token complete those of a mesh's devices.

    Fields:
        lengths: number of tokens of every text, on the devices.
        slots: capacity of a text's cache.
    """

    def __init__(self, programs: Programs, texts: Sequence[Sequence[int]]) -> None:
        rows, _ = padded([list(text) for text in texts], [len(text) for text in texts], programs.mesh)
        self._programs, self._count = programs, len(rows)
        self._sizes = bucket_lengths(max(map(len, rows)))
        self.slots = max(SMALLEST_CACHE, 1 << (sum(self._sizes) - 1).bit_length())
        self._tokens, lengths = in_rows(rows, self.slots + 1)
        self.lengths = programs.put(lengths, BY_SEQUENCE)

    def __iter__(self) -> Iterator[Chunk]:
        start = 0
        for size in self._sizes:
            tokens = self._programs.put(self._tokens[:, start : start + size + 1], BY_SEQUENCE)
            yield Chunk(slice(start, start + size), tokens, self._programs.put(np.array(start, np.int32)))
            start += size

    def empty(self, prefill: TargetPrefill, params: Decoder) -> PrefillState:
        """Make the state before the first chunk."""
        specs = None if self._programs.mesh is None else prefill.specs(params)
        count, slots = self._count, self.slots
        return self._programs.make((prefill, count, slots), lambda: prefill.init(params, count, slots), specs)


def read_chunk(
    prefill: TargetPrefill,
    params: Decoder,
    state: PrefillState,
    tokens: Int[Array, "texts chunk"],
    start: Int[Array, ""],
    lengths: Int[Array, " texts"],
) -> tuple[PrefillState, Float[Array, "texts chunk model"]]:
    """Read a chunk; also returns its hidden states after the last norm."""
    last_boundary = (prefill.config.num_hidden_layers,)
    state, hidden = prefill.read_with_aux(params, state, tokens, start, lengths, last_boundary)
    assert hidden is not None
    return state, apply_norm(hidden, params.norm, prefill.config.rms_norm_eps)


def hidden_states(
    programs: Programs, prefill: TargetPrefill, params: Decoder, texts: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """Read texts; yields the hidden states after the last norm of every chunk, on the host."""
    chunks = TextChunks(programs, texts)
    state, specs = chunks.empty(prefill, params), (prefill.specs(params), cast(Any, BY_SEQUENCE))
    for _, tokens, start in chunks:
        given = (tokens[:, :-1], start, chunks.lengths)
        state, hidden = programs.run(read_chunk, prefill, params, state, *given, donate=True, specs=specs)
        yield fetch(hidden)


def in_blocks(function: Callable[..., Any], *rows: Array) -> Any:
    """Map a function over blocks of positions of `[texts, chunk, ...]`: the logits of a whole chunk may be larger than
    the model."""
    blocks = rows[0].shape[1] // SMALLEST_BUCKET

    def split(leaf: Array) -> Array:
        texts, chunk, *rest = leaf.shape
        return leaf.reshape(texts, blocks, chunk // blocks, *rest).swapaxes(0, 1)

    def joined(leaf: Array) -> Array:
        blocks, texts, size, *rest = leaf.shape
        return leaf.swapaxes(0, 1).reshape(texts, blocks * size, *rest)

    found = jax.lax.map(lambda block: function(*block), tuple(split(leaf) for leaf in rows))
    return jax.tree.map(joined, found)
