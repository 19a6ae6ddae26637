"""The decoder's forward pass as a pure function of parameters, tokens, positions, mask and cache.

One function serves prefill, one-token steps and tree verification, which differ in mask and positions, and every model
family, which differ in `DecoderConfig`. Layers run in a Python loop where `Decoder.stacked` is false, and under
`lax.scan` over runs of equal layers where it is true, with the same arithmetic.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig, RopeConfig
from moespec_jax.errors import RequestError
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.layer_blocks import Angles, Context, Layer, LayerForm, attention_block, mlp_block
from moespec_jax.nn.layers import Norm, rope_angles
from moespec_jax.nn.moe import Restrict, RouterInfo
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import all_gather, own_shard
from moespec_jax.parallel.mesh import REPLICATED, ShardingPlan


@struct.dataclass
class Decoder:
    """All parameters of a decoder.

    Fields:
        embed: input embedding.
        layers: one entry for each layer, or, if `stacked`, for each run of consecutive layers of equal kind
            (`layer_runs`), with a leading axis over the run.
        experts: routed experts of all sparse layers, in the layout of the back-end (`experts/layouts.py`).
        norm: last norm.
        lm_head: output matrix; None where the embedding is tied.
        lm_head_bias: bias of logits; None where the family has none.
        stacked: whether layers are stacked.
        sharding: which parts are split over which axes of a mesh, where the program runs on every device of one.
        logits_scaling: divisor of logits.
    """

    embed: Float[Array, "vocab model"]
    layers: tuple[Layer, ...]
    experts: object
    norm: Norm
    lm_head: Float[Array, "vocab_shard model"] | None
    lm_head_bias: Float[Array, " vocab"] | None = None
    stacked: bool = struct.field(pytree_node=False, default=False)
    sharding: ShardingPlan = struct.field(pytree_node=False, default=REPLICATED)
    logits_scaling: float = struct.field(pytree_node=False, default=1.0)

    __repr__ = summary


class ForwardInfo(NamedTuple):
    """Intermediate results of a forward pass.

    Fields:
        routers: routing of every sparse layer, in order of depth.
        aux_hidden_states: hidden states at the requested `boundaries`, concatenated in their order; None without any.
    """

    routers: tuple[RouterInfo, ...]
    aux_hidden_states: Float[Array, "batch tokens aux"] | None = None


def forward(
    config: DecoderConfig,
    params: Decoder,
    tokens: Int[Array, "batch tokens"],
    positions: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens slots"],
    cache: Cache | None,
    backend: Backend,
    *,
    valid: Bool[Array, "batch tokens"] | None = None,
    rope_length: Int[Array, "*rows"] | None = None,
    boundaries: tuple[int, ...] = (),
    restrict: Restrict | None = None,
) -> tuple[Float[Array, "batch tokens model"], Cache | None, ForwardInfo]:
    """Run the decoder over some tokens of every sequence.

    Args:
        config: the decoder's settings.
        params: its parameters, in the layout of `backend`.
        tokens: token ids.
        positions: position of every token in its sequence.
        mask: `mask[b, t, s]` is true where token t of sequence b attends to cache slot s; without a cache, to token s.
        cache: KV cache; this pass writes the rows of its tokens from slot `cache.length[b]` on. `length` itself stays:
            the caller decides how many of the rows to keep.
        backend: expert compute and attention.
        valid: tokens that are not padding (default: all).
        rope_length: sequence length for dynamic NTK RoPE, one for all rows or one for each (default: the largest
            valid position + 1).
        boundaries: hidden states to return: b is the residual stream entering layer b, before any norm; the number of
            layers stands for the last layer's output.
        restrict: limit on the experts of every sparse layer. Rows that it prunes are not valid in later layers.

    Returns:
        Hidden states after the last norm, the cache with the new rows, and intermediate results.

    Raises:
        RequestError: layers are stacked and there is no cache. In a derivative: the back-end has none.
    """
    x = params.embed[tokens]
    x = x if config.embedding_multiplier == 1.0 else x * jnp.asarray(config.embedding_multiplier, x.dtype)
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    rope_length = jnp.max(jnp.where(valid, positions, 0)) + 1 if rope_length is None else rope_length
    start = jnp.zeros((len(tokens),), jnp.int32) if cache is None else cache.length
    angles = tuple(_angles(config, rope, positions, rope_length) for rope in _rope_kinds(config))
    slot_positions = _slot_positions(positions, start, mask.shape[-1])
    context = Context(
        positions, slot_positions, mask, start, angles, boundaries,
        backend.compute(config.expert_activation), backend, restrict, params.sharding,
    )  # fmt: skip
    run = _scanned_layers if params.stacked else _unrolled_layers
    return run(config, params, x, valid.reshape(-1), context, cache)


def unembed(params: Decoder, hidden: Float[Array, "*batch model"]) -> Float[Array, "*batch vocab"]:
    """Compute float32 logits."""
    return all_gather(shard_logits(params, hidden), params.sharding.vocabulary)


def shard_logits(params: Decoder, hidden: Float[Array, "*batch model"]) -> Float[Array, "*batch vocab_shard"]:
    """Compute float32 logits over this device's shard of the vocabulary."""
    axes, head = params.sharding.vocabulary, params.lm_head
    if head is None:
        # An embedding is replicated for its look-ups; as output matrix, each device multiplies by its part of it.
        head = own_shard(params.embed, axes, axis=0)
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    if params.lm_head_bias is not None:
        bias = own_shard(params.lm_head_bias, axes).astype(jnp.float32)
        logits = logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
    return logits if params.logits_scaling == 1.0 else logits / params.logits_scaling


def layer_runs(config: DecoderConfig) -> list[range]:
    """List maximal runs of consecutive layers of the same kind: dense or sparse, and of shapes and operations that
    cannot be traced. One `lax.scan` covers a run."""
    runs: list[range] = []
    kinds = [_kind(config, i) for i in range(config.num_hidden_layers)]
    for i, kind in enumerate(kinds):
        if runs and kinds[runs[-1].start] == kind:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return runs


def _kind(config: DecoderConfig, layer: int) -> tuple[Any, ...]:
    """Properties that the layers of one run have in common."""
    rope = config.layer_ropes[layer]
    rotated = config.head_dim if rope is None else rope.rotary_dim(config.head_dim)
    return config.sparse_layers[layer], config.heads_of(layer), rotated, config.qk_norm == "unit" and rope is not None


def _rope_kinds(config: DecoderConfig) -> list[RopeConfig | None]:
    """List the distinct rotary embeddings of layers; None is that of layers without."""
    return list(dict.fromkeys(config.layer_ropes))


def _angles(config: DecoderConfig, rope: RopeConfig | None, positions: Array, length: Array) -> Angles:
    """Compute cosine and sine; those of no rotation without `rope`."""
    if rope is None:
        one = jnp.ones((*positions.shape, config.head_dim // 2), jnp.float32)
        return one, jnp.zeros_like(one)
    return rope_angles(rope, config.head_dim, config.max_position_embeddings, positions, length)


def _layer_form(config: DecoderConfig, layer: int) -> LayerForm:
    """Collect the settings of attention that a layer has of its own."""
    rope = config.layer_ropes[layer]
    chunk = config.attention_chunks[layer] if config.attention_chunks else 0
    return LayerForm(config.sliding_windows[layer], chunk, _rope_kinds(config).index(rope), rope is not None)


def _of_layer(config: DecoderConfig, layer: int) -> DecoderConfig:
    """Settings of a layer's attention: layers without rotary embedding have no norm of unit weight."""
    plain = config.qk_norm == "unit" and config.layer_ropes[layer] is None
    return dataclasses.replace(config, qk_norm="none") if plain else config


def _slot_positions(
    positions: Int[Array, "batch tokens"], start: Int[Array, " batch"], slots: int
) -> Int[Array, "batch slots"]:
    """Position of the token in every cache slot: committed slots hold the token of their own position, the slots that
    this pass writes from `start[b]` on those of the positions given."""
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
    new, count = slot - start[:, None], positions.shape[1]
    given = jnp.take_along_axis(positions, jnp.clip(new, 0, count - 1), axis=1)
    return jnp.where((new >= 0) & (new < count), given, slot)


def _unrolled_layers(
    config: DecoderConfig,
    params: Decoder,
    x: Array,
    valid: Array,
    context: Context,
    cache: Cache | None,
) -> tuple[Array, Cache | None, ForwardInfo]:
    """Run layers in a Python loop, and the last norm."""
    add_norm, eps = context.backend.add_norm, config.rms_norm_eps
    keys, values, routers, entering, y = [], [], [], [], None
    for i, layer in enumerate(params.layers):  # a block's output is added with the norm of the next
        x, h = add_norm(x, y, layer.input_norm, eps)
        entering.append(x)
        kv = None if cache is None else (cache.k[i], cache.v[i])
        mixed, kv = attention_block(_of_layer(config, i), layer, h, context, _layer_form(config, i), kv)
        x, h = add_norm(x, mixed, layer.post_attention_norm, eps)
        y, valid, info = mlp_block(config, params.experts, layer, len(routers), h, valid, context)
        if info is not None:
            routers.append(info)
        if kv is not None:
            keys.append(kv[0])
            values.append(kv[1])
    if cache is not None:
        cache = dataclasses.replace(cache, k=tuple(keys), v=tuple(values))
    x, h = add_norm(x, y, params.norm, eps)
    states = [*entering, x]
    aux = jnp.concatenate([states[b] for b in context.boundaries], axis=-1) if context.boundaries else None
    return h, cache, ForwardInfo(tuple(routers), aux)


def _scanned_layers(
    config: DecoderConfig,
    params: Decoder,
    x: Array,
    valid: Array,
    context: Context,
    cache: Cache | None,
) -> tuple[Array, Cache | None, ForwardInfo]:
    """Run layers under `lax.scan`, and the last norm. The cache is carried and updated in place; experts stay outside,
    indexed by layer. Auxiliary hidden states are carried: as outputs of the scan, those of all layers would be kept."""
    if cache is None:
        raise RequestError(
            "expected a cache (nn.cache.empty_cache) for a model whose layers are stacked; without one, load it with"
            " backend=moespec_jax.BACKENDS['dense']"
        )
    routers: list[RouterInfo] = []
    carry = (x, valid, cache.k, cache.v, tuple(jnp.zeros_like(x) for _ in context.boundaries))
    for run, layers in zip(layer_runs(config), params.layers, strict=True):
        first = sum(config.sparse_layers[: run.start])
        count = jnp.arange(len(run), dtype=jnp.int32)
        forms, of_run = _forms(config, run, context)
        step = partial(_scan_step, _of_layer(config, run.start), params.experts, of_run)
        carry, info = jax.lax.scan(step, carry, (layers, run.start + count, first + count, forms))
        if info is not None:
            routers += [jax.tree.map(lambda a, i=i: a[i], info) for i in range(len(run))]
    x, _, k, v, aux = carry
    aux = _take_aux(context.boundaries, jnp.int32(config.num_hidden_layers), x, aux)
    h = context.backend.add_norm(x, None, params.norm, config.rms_norm_eps)[1]
    cache = Cache(k, v, cache.length)
    return h, cache, ForwardInfo(tuple(routers), jnp.concatenate(aux, axis=-1) if aux else None)


def _forms(config: DecoderConfig, run: range, context: Context) -> tuple[LayerForm, Context]:
    """Stack the forms of a run's layers, whose angles are all in the context that is returned."""
    forms = [_layer_form(config, i) for i in run]
    ropes = sorted({int(form.rope) for form in forms})
    forms = [form._replace(rope=ropes.index(int(form.rope))) for form in forms]
    of_run = context._replace(angles=tuple(context.angles[rope] for rope in ropes))
    return LayerForm(*(jnp.asarray(values) for values in zip(*forms, strict=True))), of_run


def _scan_step(config: DecoderConfig, experts: object, context: Context, carry: Any, xs: Any) -> tuple[Any, Any]:
    """Run one layer of a scan."""
    x, valid, k, v, aux = carry
    layer, index, sparse_index, form = xs
    add_norm, eps = context.backend.add_norm, config.rms_norm_eps
    aux = _take_aux(context.boundaries, index, x, aux)
    x, h = add_norm(x, None, layer.input_norm, eps)
    mixed, kv = attention_block(config, layer, h, context, form, (k, v), index)
    assert kv is not None
    x, h = add_norm(x, mixed, layer.post_attention_norm, eps)
    y, valid, info = mlp_block(config, experts, layer, sparse_index, h, valid, context)
    return (x + y, valid, *kv, aux), info


def _take_aux(boundaries: tuple[int, ...], layer: Array, x: Array, aux: tuple[Array, ...]) -> tuple[Array, ...]:
    """Replace the states of the boundaries at `layer` by the hidden state that enters it."""
    return tuple(jnp.where(layer == b, x, kept) for b, kept in zip(boundaries, aux, strict=True))
