"""Conversion of a draft head's config.json and tensor shapes into a `DraftConfig`.

Three formats are distinguished: that of EAGLE's repository (arXiv:2503.01840), that of SpecForge and ModelOpt, and that
of vLLM's speculators. Where config.json and tensor shapes disagree, the shapes have precedence.
"""

from collections.abc import Sequence
from typing import NamedTuple

from moespec_jax.checkpoint.config_fields import (
    Fields,
    Places,
    errors_at,
    look_up,
    read_count,
    read_flag,
    read_number,
    section,
)
from moespec_jax.checkpoint.head.boundaries import Format, resolve_boundaries
from moespec_jax.checkpoint.head.tensor_table import EMBEDDING, LM_HEAD, layer_number
from moespec_jax.checkpoint.head.unsupported import Shapes, check_supported
from moespec_jax.checkpoint.rope import read_rope
from moespec_jax.config import DecoderConfig, DraftConfig, QkNorm
from moespec_jax.errors import UnsupportedConfig
from moespec_jax.files import listing

MOST_LAYERS = 1 << 6
# Tensors whose shapes give the head's sizes.
_SIZED = (
    "fc.weight",
    LM_HEAD,
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.mlp.gate_proj.weight",
)


class HeadDescription(NamedTuple):
    """A draft head as its files describe it.

    Fields:
        config: settings.
        format: format of the files.
        notes: lines to show the user: the origin of the boundaries, and contradictions and ambiguities of the files.
        shares_lm_head: whether it has no output matrix, and shares the target's.
    """

    config: DraftConfig
    format: Format
    notes: tuple[str, ...]
    shares_lm_head: bool = False


class Sizes(NamedTuple):
    """Sizes of a head, as fields of its settings."""

    hidden_size: int
    intermediate_size: int
    draft_vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


def describe_head(
    fields: Fields,
    shapes: Shapes,
    target: DecoderConfig,
    *,
    name: str = "",
    boundaries: tuple[int, ...] | None = None,
    where: str = "the head",
) -> HeadDescription:
    """Describe a draft head from its config.json and the shapes of its tensors.

    Args:
        fields: config.json.
        shapes: shapes of the tensors by canonical name.
        target: settings of the target.
        name: hub id or directory of the head, to find corrections for single repositories.
        boundaries: overrides those of the files.
        where: place to name in errors.

    Raises:
        CheckpointError: a field is missing or wrong, the head is not computed as an EAGLE-3 head, its tensors do not
            match each other, or it was not trained for this target.
    """
    with errors_at(where):
        return _describe(fields, shapes, target, name, boundaries)


def detect_format(fields: Fields) -> Format:
    """Detect the format of a config.json."""
    if fields.get("speculators_model_type") is not None:
        return "speculators"
    architectures = fields.get("architectures")
    named = isinstance(architectures, list) and "LlamaForCausalLMEagle3" in architectures
    return "specforge" if named or fields.get("eagle_config") is not None else "eagle"


def _describe(
    fields: Fields, shapes: Shapes, target: DecoderConfig, name: str, explicit: tuple[int, ...] | None
) -> HeadDescription:
    head_format = detect_format(fields)
    inner = section(fields, "transformer_layer_config") if head_format == "speculators" else fields
    places = (inner, section(fields, "eagle_config"), fields)
    check_supported(places, shapes)
    shares_lm_head = LM_HEAD not in shapes and _shares_lm_head(places, shapes, target)
    if shares_lm_head:
        shapes = {**shapes, LM_HEAD: (target.vocab_size, target.hidden_size)}
    if missing := [tensor for tensor in _SIZED if tensor not in shapes]:
        raise UnsupportedConfig(
            f"expected the tensors of an EAGLE-3 head; got {len(missing)} missing: {listing(missing)}"
        )
    sizes, warnings = read_sizes(places, shapes)
    boundaries = resolve_boundaries(fields, head_format, target, name, explicit)
    check_target(places, shapes, sizes, len(boundaries.values), target)
    variants, variant_warnings = _read_variants(places, shapes, head_format)
    rope = read_rope(inner, 10_000.0)
    if head_format == "eagle" and rope.rope_theta != 10_000.0:
        variant_warnings.append(
            f"rope_theta {rope.rope_theta:g} of config.json is used; EAGLE's own code trains with 10000"
        )
    config = DraftConfig(
        **sizes._asdict(),
        **variants,
        vocab_size=target.vocab_size,
        target_hidden_size=target.hidden_size,
        boundaries=boundaries.values,
        num_hidden_layers=_count_layers(places, shapes, head_format),
        max_position_embeddings=read_count(places, "max_position_embeddings", 2048),
        rope=rope,
        rms_norm_eps=read_number(places, "rms_norm_eps", 1e-6),
        hidden_act=look_up(places, "hidden_act") or "silu",
        qk_norm=_qk_norm(inner, shapes, head_format),
        own_embedding=EMBEDDING in shapes or sizes.hidden_size != target.hidden_size,
    )
    if shares_lm_head:
        warnings.append(f"there is no {LM_HEAD}: the head shares the target's, as in vLLM and SGLang")
    origin = f"boundaries {', '.join(map(str, boundaries.values))}: {boundaries.origin}"
    return HeadDescription(config, head_format, (origin, *warnings, *variant_warnings), shares_lm_head)


def _shares_lm_head(places: Places, shapes: Shapes, target: DecoderConfig) -> bool:
    """Test whether a head without an output matrix can share the target's: it has the target's vocabulary and width,
    and is not tied to an embedding, which is another matrix."""
    whole = read_count(places, "draft_vocab_size", None) in (None, target.vocab_size)
    tied = read_flag(places, "tie_word_embeddings", False)
    same = not tied or (target.tie_word_embeddings and EMBEDDING not in shapes)
    return whole and shapes.get("fc.weight", ())[:1] == (target.hidden_size,) and same


def read_sizes(places: Places, shapes: Shapes, sized: Sequence[str] = _SIZED) -> tuple[Sizes, list[str]]:
    """Read sizes from the shapes of `fc`, the output matrix, `q`, `k` and `gate` of a layer, which `sized` names, with
    warnings where config.json disagrees. Only numbers of heads are read from config.json: shapes do not determine them.

    Raises:
        UnsupportedConfig: a tensor is no matrix, or the heads are not of one even size.
    """
    for name in sized:
        if len(shapes[name]) != 2 or 0 in shapes[name]:
            raise UnsupportedConfig(f"expected {name} to be a matrix; got {list(shapes[name])}")
    fc, lm_head, q, k, gate = (shapes[name] for name in sized)
    heads = read_count(places, "num_attention_heads", None)
    if heads is None:
        raise UnsupportedConfig("config.json of a draft head lacks the field 'num_attention_heads'")
    kv_heads = read_count(places, "num_key_value_heads", heads)
    head_dim = q[0] // heads
    if head_dim * heads != q[0] or head_dim * kv_heads != k[0] or head_dim % 2 or not head_dim or heads % kv_heads:
        raise UnsupportedConfig(
            f"expected q_proj and k_proj of {heads} and {kv_heads} heads of one even size, the first a multiple of the"
            f" second; got {list(q)} and {list(k)}"
        )
    sizes = Sizes(fc[0], gate[0], lm_head[0], heads, kv_heads, head_dim)
    warnings = []
    for name in ("hidden_size", "intermediate_size", "draft_vocab_size", "head_dim"):
        stated, actual = read_count(places, name, None), getattr(sizes, name)
        if stated not in (None, actual):
            warnings.append(f"config.json has {name} {stated}, its tensors {actual}, which is used")
    return sizes, warnings


def check_target(places: Places, shapes: Shapes, sizes: Sizes, states: int, target: DecoderConfig) -> None:
    """Check that a head was trained for this target, from `states` of its hidden states.

    Raises:
        UnsupportedConfig: it was not.
    """
    width, aux_size = read_count(places, "target_hidden_size", None), shapes["fc.weight"][1]
    if width not in (None, target.hidden_size) or aux_size != states * target.hidden_size:
        stated = f", and config.json has target_hidden_size {width}" if width is not None else ""
        raise UnsupportedConfig(
            f"expected a head for {states} states of width {target.hidden_size}, as this {target.model_type} has:"
            f" fc.weight with {states * target.hidden_size} inputs; it has {aux_size}{stated}"
        )
    vocab = read_count(places, "vocab_size", None)
    if vocab not in (None, target.vocab_size) or sizes.draft_vocab_size > target.vocab_size:
        raise UnsupportedConfig(
            f"expected a head for a vocabulary of {target.vocab_size}, as this {target.model_type} has; its vocab_size"
            f" is {vocab}, and lm_head.weight has {sizes.draft_vocab_size} rows"
        )


def _read_variants(places: Places, shapes: Shapes, head_format: Format) -> tuple[dict[str, bool], list[str]]:
    """Read the variants that change results, with warnings. Norms before `fc` and biases are on where their tensors
    exist or config.json has them on: without tensors, they are reported as missing later."""
    found = {
        "norm_before_fc": "input_norm.weight" in shapes,
        "fc_norm": any(name.startswith("fc_norm.") for name in shapes),
        "attention_bias": any(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for name in shapes),
    }
    warnings = []
    for name, present in found.items():
        stated = read_flag(places, name, None)
        if stated is False and present:
            warnings.append(f"config.json has {name} false, but there are tensors for it, which are used")
        found[name] = present or bool(stated)
    if found["norm_before_fc"] and found["fc_norm"]:
        raise UnsupportedConfig("expected one of norm_before_fc and fc_norm; this head has both")
    # On by default in vLLM's reader of speculators files.
    found["norm_before_residual"] = read_flag(places, "norm_before_residual", head_format == "speculators")
    found["fc_bias"] = "fc.bias" in shapes
    output = read_flag(places, "norm_output", None)
    found["norm_output"] = bool(output) and head_format != "specforge"
    if output is not None and head_format == "specforge":
        warnings.append(
            f"norm_output {str(output).lower()} is ambiguous in this format; read as in SpecForge's training: the next"
            " step reads the state before the last norm, and the logits are computed from the state after it"
        )
    return found, warnings


def _qk_norm(inner: Fields, shapes: Shapes, head_format: Format) -> QkNorm:
    """Detect norms of queries and keys: per head where their tensors exist, and in Qwen3 layers of speculators."""
    present = any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in shapes)
    required = head_format == "speculators" and str(inner.get("model_type")).startswith("qwen3")
    return "head" if present or required else "none"


def _count_layers(places: Places, shapes: Shapes, head_format: Format) -> int:
    """Count layers by their tensors. config.json is used where it has more, whose tensors are then missing; EAGLE's own
    files have arbitrary numbers there."""
    found = len({layer_number(name) for name in shapes} - {None})
    stated = read_count(places, "num_hidden_layers", None, MOST_LAYERS)
    return found if head_format == "eagle" or stated is None else max(found, stated)
