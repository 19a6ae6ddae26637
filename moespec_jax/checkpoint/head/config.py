"""A published draft head's config.json and tensor shapes, read as a `DraftConfig`.

Three formats are told apart: EAGLE's repository (arXiv:2503.01840), SpecForge's and ModelOpt's, and vLLM's
speculators. Where shapes and file disagree the shapes win, since they are what will be computed with.
"""

from typing import NamedTuple

from moespec_jax.checkpoint.config_fields import Fields
from moespec_jax.checkpoint.families import read_rope
from moespec_jax.checkpoint.head.boundaries import Format, resolve_boundaries
from moespec_jax.checkpoint.head.fields import look_up, read_count, read_flag, read_number, section
from moespec_jax.checkpoint.head.tensor_table import EMBEDDING, layer_number
from moespec_jax.checkpoint.head.unsupported import Shapes, refuse_other_heads
from moespec_jax.config import DecoderConfig, DraftConfig, QkNorm
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.files import listing

_MOST_LAYERS = 1 << 6
# Sizes are read from these, so they must be there before anything can be said of the others.
_SIZED = (
    "fc.weight",
    "lm_head.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.mlp.gate_proj.weight",
)


class HeadDescription(NamedTuple):
    """A head's settings, the format it came in, and lines to show whoever loads it: where its boundaries come from,
    and what in its files is contradictory or ambiguous."""

    config: DraftConfig
    format: Format
    notes: tuple[str, ...]


class _Sizes(NamedTuple):
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
    """The draft head of a config.json and its tensors' shapes by canonical name, to draft for `target`.

    `name` is what the head was asked for by, a hub id or a directory, for what is known of single repositories;
    `boundaries` overrides which states are tapped; `where` is named in errors.

    Raises:
        CheckpointError: a field is missing or wrong, the head is not computed as an EAGLE-3 head, its tensors do not
            fit each other, or it was not made for this target.
    """
    try:
        return _describe(fields, shapes, target, name, boundaries)
    except UnsupportedConfig as error:
        raise CheckpointError(f"{error} ({where})") from None
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"config.json of a draft head has a field of the wrong type: {error} ({where})") from None


def detect_format(fields: Fields) -> Format:
    """Which of the three formats a config.json is of."""
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
    refuse_other_heads(places, shapes)
    if missing := [tensor for tensor in _SIZED if tensor not in shapes]:
        raise UnsupportedConfig(
            f"expected the tensors of an EAGLE-3 head; came {len(missing)} missing: {listing(missing)}"
        )
    sizes, warnings = _read_sizes(places, shapes)
    taps = resolve_boundaries(fields, head_format, target, name, explicit)
    _check_target(places, shapes, sizes, len(taps.values), target)
    variants, more = _read_variants(places, shapes, head_format)
    rope = read_rope(inner, 10_000.0)
    if head_format == "eagle" and rope.rope_theta != 10_000.0:
        more.append(f"rope_theta {rope.rope_theta:g} is used, as its file says; EAGLE's own code trains with 10000")
    config = DraftConfig(
        **sizes._asdict(),
        **variants,
        vocab_size=target.vocab_size,
        target_hidden_size=target.hidden_size,
        boundaries=taps.values,
        num_hidden_layers=_layers(places, shapes, head_format),
        max_position_embeddings=read_count(places, "max_position_embeddings") or 2048,
        rope=rope,
        rms_norm_eps=read_number(places, "rms_norm_eps", 1e-6),
        hidden_act=look_up(places, "hidden_act") or "silu",
        qk_norm=_qk_norm(inner, shapes, head_format),
        own_embedding=EMBEDDING in shapes or sizes.hidden_size != target.hidden_size,
    )
    tapped = f"boundaries {', '.join(map(str, taps.values))}: {taps.origin}"
    return HeadDescription(config, head_format, (tapped, *warnings, *more))


def _read_sizes(places: tuple[Fields, ...], shapes: Shapes) -> tuple[_Sizes, list[str]]:
    """Sizes as the tensors have them; the number of heads is the one thing only the file knows."""
    for name in _SIZED:
        if len(shapes[name]) != 2 or 0 in shapes[name]:
            raise UnsupportedConfig(f"expected {name} to be a matrix; came {list(shapes[name])}")
    fc, lm_head, q, k, gate = (shapes[name] for name in _SIZED)
    heads = read_count(places, "num_attention_heads")
    if heads is None:
        raise UnsupportedConfig("config.json of a draft head lacks the field 'num_attention_heads'")
    kv_heads = read_count(places, "num_key_value_heads") or heads
    head_dim = q[0] // heads
    if head_dim * heads != q[0] or head_dim * kv_heads != k[0] or head_dim % 2 or not head_dim or heads % kv_heads:
        raise UnsupportedConfig(
            f"expected q_proj and k_proj of {heads} and {kv_heads} heads of one even size, the first a multiple of the"
            f" second; came {list(q)} and {list(k)}"
        )
    sizes = _Sizes(fc[0], gate[0], lm_head[0], heads, kv_heads, head_dim)
    warnings = []
    for name in ("hidden_size", "intermediate_size", "draft_vocab_size", "head_dim"):
        said, came = read_count(places, name), getattr(sizes, name)
        if said not in (None, came):
            warnings.append(f"config.json says {name} {said}, its tensors {came}, which is used")
    return sizes, warnings


def _check_target(places: tuple[Fields, ...], shapes: Shapes, sizes: _Sizes, taps: int, target: DecoderConfig) -> None:
    """Refuse a head made for another target."""
    width, aux = read_count(places, "target_hidden_size"), shapes["fc.weight"][1]
    if width not in (None, target.hidden_size) or aux != taps * target.hidden_size:
        said = f", and config.json says target_hidden_size {width}" if width is not None else ""
        raise UnsupportedConfig(
            f"expected a head for {taps} states of width {target.hidden_size}, as this {target.model_type} has:"
            f" fc.weight with {taps * target.hidden_size} inputs; it has {aux}{said}"
        )
    vocab = read_count(places, "vocab_size")
    if vocab not in (None, target.vocab_size) or sizes.draft_vocab_size > target.vocab_size:
        raise UnsupportedConfig(
            f"expected a head for a vocabulary of {target.vocab_size}, as this {target.model_type} has; its vocab_size"
            f" is {vocab}, and lm_head.weight has {sizes.draft_vocab_size} rows"
        )


def _read_variants(
    places: tuple[Fields, ...], shapes: Shapes, head_format: Format
) -> tuple[dict[str, bool], list[str]]:
    """The variants that change numbers. Norms before `fc` are there if their tensors or the file say so: what only the
    file says is then a missing tensor."""
    found = {
        "norm_before_fc": "input_norm.weight" in shapes,
        "fc_norm": any(name.startswith("fc_norm.") for name in shapes),
        "attention_bias": any(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for name in shapes),
    }
    warnings = []
    for name, present in found.items():
        said = read_flag(places, name)
        if said is False and present:
            warnings.append(f"config.json says {name} false, but there are tensors for it, which are used")
        found[name] = present or bool(said)
    if found["norm_before_fc"] and found["fc_norm"]:
        raise UnsupportedConfig("expected one of norm_before_fc and fc_norm; this head has both")
    residual = read_flag(places, "norm_before_residual")
    # vLLM takes it as on where a speculators file says nothing.
    found["norm_before_residual"] = head_format == "speculators" if residual is None else residual
    found["fc_bias"] = "fc.bias" in shapes
    output = read_flag(places, "norm_output")
    found["norm_output"] = bool(output) and head_format != "specforge"
    if output is not None and head_format == "specforge":
        warnings.append(
            f"norm_output {str(output).lower()} is ambiguous in this format; read as in SpecForge's training: each step"
            " hands on its state before the last norm, and the logits are of the normed one"
        )
    return found, warnings


def _qk_norm(inner: Fields, shapes: Shapes, head_format: Format) -> QkNorm:
    """Per head where there are norms, and where a speculators layer is Qwen3's and must have them."""
    present = any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in shapes)
    asked = head_format == "speculators" and str(inner.get("model_type")).startswith("qwen3")
    return "head" if present or asked else "none"


def _layers(places: tuple[Fields, ...], shapes: Shapes, head_format: Format) -> int:
    """As many as there are tensors of. EAGLE's own files say any number; in others, more are missing ones."""
    found = len({layer_number(name) for name in shapes} - {None})
    said = read_count(places, "num_hidden_layers", _MOST_LAYERS)
    return found if head_format == "eagle" or said is None else max(found, said)
