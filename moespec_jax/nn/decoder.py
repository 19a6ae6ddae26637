"""The decoder's forward pass as a pure function of parameters, tokens, positions, mask and cache.

One function serves prefill, one-token steps and tree verification (they differ in mask and positions), and every
family (they differ in `DecoderConfig`). Layers run one after another in Python where `Decoder.stacked` is false, under
`lax.scan` over runs of equal layers where it is true; the arithmetic is the same.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.nn.attention import (
    Attention,
    LayerAttention,
    attend,
    attend_layer,
    output_projection,
    project_qkv,
    within_window,
)
from moespec_jax.nn.cache import Cache, write_rows
from moespec_jax.nn.layers import GatedMlp, gated_mlp, rms_norm, rope_angles
from moespec_jax.nn.moe import ExpertCompute, Restrict, RouterInfo, SparseMlp, sparse_mlp
from moespec_jax.parallel.collectives import joined, part_index, total
from moespec_jax.parallel.mesh import WHOLE, Split


@struct.dataclass
class Layer:
    """One pre-norm transformer layer without its experts."""

    input_norm: Float[Array, " model"]
    attention: Attention
    post_attention_norm: Float[Array, " model"]
    mlp: GatedMlp | SparseMlp


@struct.dataclass
class Decoder:
    """All parameters of a decoder.

    `layers` is one entry a layer, or, if `stacked`, one entry for each run of consecutive layers of equal kind with a
    leading axis over the run. `experts` is in the layout of the expert back-end. `lm_head` is None where it is tied.
    On a mesh, `split` says what of it is split, and the program runs on every device (`jax.shard_map`).
    """

    embed: Float[Array, "vocab model"]
    layers: tuple[Layer, ...]
    experts: object
    norm: Float[Array, " model"]
    lm_head: Float[Array, "vocab model"] | None
    stacked: bool = struct.field(pytree_node=False, default=False)
    split: Split = struct.field(pytree_node=False, default=WHOLE)


class ForwardInfo(NamedTuple):
    """What a forward pass can tell besides its result: routing of every sparse layer, in order of depth, and the
    tapped states side by side `[batch, tokens, boundaries * model]`, None where none were asked for."""

    routers: tuple[RouterInfo, ...]
    taps: Float[Array, "batch tokens aux"] | None = None


class _Pass(NamedTuple):
    """What every layer of one forward pass shares."""

    positions: Int[Array, "batch tokens"]
    slot_positions: Int[Array, "batch slots"]
    mask: Bool[Array, "batch tokens slots"]
    start: Int[Array, " batch"]
    cos: Float[Array, "batch tokens half"]
    sin: Float[Array, "batch tokens half"]
    boundaries: tuple[int, ...]
    restrict: Restrict | None
    attention: LayerAttention
    split: Split


def forward(
    config: DecoderConfig,
    params: Decoder,
    tokens: Int[Array, "batch tokens"],
    positions: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens slots"],
    cache: Cache | None,
    compute: ExpertCompute,
    valid: Bool[Array, "batch tokens"] | None = None,
    longest: Int[Array, "*rows"] | None = None,
    boundaries: tuple[int, ...] = (),
    restrict: Restrict | None = None,
    attention: LayerAttention = attend_layer,
) -> tuple[Float[Array, "batch tokens model"], Cache | None, ForwardInfo]:
    """Final hidden states (after the last norm), the cache with this pass's rows written, and what routing chose.

    Rows are written from slot `cache.length[b]` on; `length` itself is left to the caller, who knows how many rows
    count. `mask[b, t, s]` says whether token t may see slot s. Without a cache, slots are the tokens themselves.
    `longest` is the length of the longest sequence, where this pass does not reach its end (dynamic rope asks for it),
    or that of each row's own.
    `boundaries` name states to tap: b is the residual stream entering layer b, before any norm; after the last layer,
    `num_hidden_layers`.
    `restrict` limits the experts of every sparse layer; tokens that it gives up are not valid from there on.
    `attention` reads the cache of stacked layers.
    """
    x = params.embed[tokens]
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    longest = jnp.max(jnp.where(valid, positions, 0)) + 1 if longest is None else longest
    shared = _share(config, positions, mask, cache, longest, boundaries, restrict, attention, params.split)
    run = _scanned_layers if params.stacked else _unrolled_layers
    x, cache, info = run(config, params, x, valid.reshape(-1), shared, cache, compute)
    return rms_norm(x, params.norm, config.rms_norm_eps), cache, info


def unembed(params: Decoder, hidden: Float[Array, "*batch model"]) -> Float[Array, "*batch vocab"]:
    """Logits in float32."""
    axes, head = params.split.vocabulary, params.lm_head
    if head is None:
        # The embedding is whole on every device, which multiplies by its part of it.
        size = len(params.embed) // jax.lax.axis_size(axes) if axes else len(params.embed)
        head = jax.lax.dynamic_slice_in_dim(params.embed, part_index(axes) * size, size) if axes else params.embed
    return joined(jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32), axes)


def layer_runs(config: DecoderConfig) -> list[range]:
    """Maximal runs of consecutive layers of the same kind: what one `lax.scan` can cover."""
    runs: list[range] = []
    for i, sparse in enumerate(config.sparse_layers):
        if runs and config.sparse_layers[runs[-1].start] == sparse:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return runs


def _share(
    config: DecoderConfig,
    positions: Array,
    mask: Array,
    cache: Cache | None,
    longest: Array,
    boundaries: tuple[int, ...],
    restrict: Restrict | None,
    attention: LayerAttention,
    split: Split,
) -> _Pass:
    batch, count = positions.shape
    start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
    slot = jnp.arange(mask.shape[-1], dtype=jnp.int32)[None, :]
    # Committed slots hold the token of their own position; the slots this pass writes hold the positions given.
    new = slot - start[:, None]
    slot_positions = jnp.where(
        (new >= 0) & (new < count), jnp.take_along_axis(positions, jnp.clip(new, 0, count - 1), axis=1), slot
    )
    cos, sin = rope_angles(config.rope, config.head_dim, config.max_position_embeddings, positions, longest)
    return _Pass(positions, slot_positions, mask, start, cos, sin, boundaries, restrict, attention, split)


def _attention_block(
    config: DecoderConfig,
    layer: Layer,
    x: Array,
    shared: _Pass,
    window: int | Array,
    kv: tuple[Array, Array] | None,
    index: Array | None = None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """`kv` is this layer's cache, or with `index` that of all layers, of which layer `index` is written and read."""
    h = rms_norm(x, layer.input_norm, config.rms_norm_eps)
    q, k, v = project_qkv(config, layer.attention, h, shared.cos, shared.sin, shared.split.heads)
    mask = shared.mask
    if any(config.sliding_windows):
        mask = mask & within_window(shared.positions, shared.slot_positions, window)
    if kv is None:
        mixed = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    else:
        # Written into the whole cache first and read after: the other order copies the layer's cache twice.
        kv = write_rows(kv[0], k, shared.start, index), write_rows(kv[1], v, shared.start, index)
        mixed = attend(q, *kv, mask) if index is None else shared.attention(q, *kv, index, mask)
    return x + output_projection(layer.attention, mixed, shared.split.heads), kv


def _mlp_block(
    config: DecoderConfig,
    params: Decoder,
    layer: Layer,
    index: int | Array,
    x: Array,
    valid: Array,
    shared: _Pass,
    compute: ExpertCompute,
) -> tuple[Array, Array, RouterInfo | None]:
    rows = rms_norm(x, layer.post_attention_norm, config.rms_norm_eps).reshape(-1, config.hidden_size)
    info = None
    if isinstance(layer.mlp, SparseMlp):
        split, experts = shared.split, params.experts
        y, info = sparse_mlp(config, layer.mlp, experts, index, rows, valid, compute, shared.restrict, split)
        valid = valid if info.restricted is None else info.restricted.live
    else:
        y = total(gated_mlp(rows, layer.mlp, config.hidden_act), shared.split.ffn)
    return x + y.reshape(x.shape), valid, info


def _unrolled_layers(
    config: DecoderConfig,
    params: Decoder,
    x: Array,
    valid: Array,
    shared: _Pass,
    cache: Cache | None,
    compute: ExpertCompute,
) -> tuple[Array, Cache | None, ForwardInfo]:
    keys, values, routers, entering = [], [], [], []
    for i, layer in enumerate(params.layers):
        entering.append(x)
        kv = None if cache is None else (cache.k[i], cache.v[i])
        x, kv = _attention_block(config, layer, x, shared, config.sliding_windows[i], kv)
        x, valid, info = _mlp_block(config, params, layer, len(routers), x, valid, shared, compute)
        if info is not None:
            routers.append(info)
        if kv is not None:
            keys.append(kv[0])
            values.append(kv[1])
    if cache is not None:
        cache = dataclasses.replace(cache, k=tuple(keys), v=tuple(values))
    states = [*entering, x]
    taps = jnp.concatenate([states[b] for b in shared.boundaries], axis=-1) if shared.boundaries else None
    return x, cache, ForwardInfo(tuple(routers), taps)


def _scanned_layers(
    config: DecoderConfig,
    params: Decoder,
    x: Array,
    valid: Array,
    shared: _Pass,
    cache: Cache | None,
    compute: ExpertCompute,
) -> tuple[Array, Cache | None, ForwardInfo]:
    """The cache travels as carry and is updated in place; experts stay outside the scan, indexed by layer. Taps do too:
    to have the scan give out every layer's state would take memory for all of them."""
    if cache is None:
        raise ValueError("stacked layers run with a cache only")
    windows = jnp.asarray(config.sliding_windows, jnp.int32)
    routers: list[RouterInfo] = []

    def step(carry, xs):
        x, valid, k, v, taps = carry
        layer, index, sparse_index, window = xs
        taps = _tap(shared.boundaries, index, x, taps)
        x, kv = _attention_block(config, layer, x, shared, window, (k, v), index)
        assert kv is not None
        x, valid, info = _mlp_block(config, params, layer, sparse_index, x, valid, shared, compute)
        return (x, valid, *kv, taps), info

    carry = (x, valid, cache.k, cache.v, tuple(jnp.zeros_like(x) for _ in shared.boundaries))
    for run, layers in zip(layer_runs(config), params.layers, strict=True):
        first = sum(config.sparse_layers[: run.start])
        count = jnp.arange(len(run), dtype=jnp.int32)
        carry, info = jax.lax.scan(
            step, carry, (layers, run.start + count, first + count, windows[run.start : run.stop])
        )
        if info is not None:
            routers += [jax.tree.map(lambda a, i=i: a[i], info) for i in range(len(run))]
    x, _, k, v, taps = carry
    taps = _tap(shared.boundaries, jnp.int32(config.num_hidden_layers), x, taps)
    return x, Cache(k, v, cache.length), ForwardInfo(tuple(routers), jnp.concatenate(taps, axis=-1) if taps else None)


def _tap(boundaries: tuple[int, ...], layer: Array, x: Array, taps: tuple[Array, ...]) -> tuple[Array, ...]:
    """Keep the state entering `layer` for every boundary of that number."""
    return tuple(jnp.where(layer == b, x, tap) for b, tap in zip(boundaries, taps, strict=True))
