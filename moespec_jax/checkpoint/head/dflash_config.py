"""Conversion of a DFlash or DSpark head's config.json and tensor shapes into a `DFlashConfig`.

Three formats are distinguished: that of z-lab (arXiv:2602.06036), that of DeepSpec (DSpark, flat), and that of vLLM's
speculators. Where config.json and tensor shapes disagree, the shapes have precedence.
"""

from typing import Any, Literal, NamedTuple

from moespec_jax.checkpoint.config_fields import (
    Fields,
    Places,
    as_count,
    errors_at,
    look_up,
    read_count,
    read_flag,
    read_number,
    section,
    shown,
)
from moespec_jax.checkpoint.head.boundaries import resolve_taps
from moespec_jax.checkpoint.head.config import MOST_LAYERS, check_target, read_sizes
from moespec_jax.checkpoint.head.tensor_table import EMBEDDING, LM_HEAD
from moespec_jax.checkpoint.head.unsupported import BLOCK_KINDS, Shapes, check_block_supported
from moespec_jax.checkpoint.rope import read_rope
from moespec_jax.config import DecoderConfig
from moespec_jax.dflash_config import Confidence, DFlashConfig, Markov
from moespec_jax.errors import UnsupportedConfig
from moespec_jax.files import listing

BlockFormat = Literal["z-lab", "deepspec", "speculators"]
_MARKOV: tuple[Markov, ...] = ("vanilla", "gated", "rnn")
_MOST_ROWS = 1 << 8
# Tensors whose shapes give the head's sizes.
_SIZED = (
    "fc.weight",
    LM_HEAD,
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.k_proj.weight",
    "layers.0.mlp.gate_proj.weight",
)


class BlockDescription(NamedTuple):
    """A DFlash or DSpark head as its files describe it.

    Fields:
        config: settings.
        format: format of the files.
        notes: lines to show the user: the origin of the boundaries, and contradictions of the files.
        shares_lm_head: whether it has no output matrix, and shares the target's.
    """

    config: DFlashConfig
    format: BlockFormat
    notes: tuple[str, ...]
    shares_lm_head: bool = False


def is_block_head(fields: Fields) -> bool:
    """Test whether a config.json is that of a block drafter, be it one that is supported or not."""
    kind = fields.get("speculators_model_type")
    if kind is not None:
        return kind in BLOCK_KINDS
    architectures = fields.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    return "dflash_config" in fields or any("DFlash" in name or "DSpark" in name for name in names)


def describe_block_head(
    fields: Fields,
    shapes: Shapes,
    target: DecoderConfig,
    *,
    name: str = "",
    boundaries: tuple[int, ...] | None = None,
    where: str = "the head",
) -> BlockDescription:
    """Describe a DFlash or DSpark head from its config.json and the shapes of its tensors.

    Args:
        fields: config.json.
        shapes: shapes of the tensors by published name.
        target: settings of the target.
        name: hub id or directory of the head, to find corrections for single repositories.
        boundaries: overrides those of the files.
        where: place to name in errors.

    Raises:
        CheckpointError: a field is missing or wrong, the head is of another kind, its tensors do not match each other,
            or it was not trained for this target.
    """
    with errors_at(where):
        return _describe(fields, shapes, target, name, boundaries)


def _describe(
    fields: Fields, shapes: Shapes, target: DecoderConfig, name: str, explicit: tuple[int, ...] | None
) -> BlockDescription:
    speculators = fields.get("speculators_model_type") is not None
    inner = section(fields, "transformer_layer_config") if speculators else fields
    places = (section(fields, "dflash_config"), inner, fields)
    check_block_supported(places, shapes)
    spark = _is_spark(fields, shapes)
    shares_lm_head = LM_HEAD not in shapes and _shares_lm_head(places, shapes, target)
    if shares_lm_head:
        shapes = {**shapes, LM_HEAD: (target.vocab_size, target.hidden_size)}
    if missing := [tensor for tensor in _SIZED if tensor not in shapes]:
        raise UnsupportedConfig(
            f"expected the tensors of a DFlash head; got {len(missing)} missing: {listing(missing)}"
        )
    sizes, warnings = read_sizes(places, shapes, _SIZED)
    layers = _count_layers(places, shapes)
    taps = resolve_taps(places, speculators, target, layers, name, explicit)
    check_target(places, shapes, sizes, len(taps.values), target)
    config = DFlashConfig(
        **sizes._asdict(),
        **_read_block(places, target, default=8 if speculators else 16),
        **_read_windows(inner, places, layers, speculators),
        **(_read_spark(places) if spark else {}),
        vocab_size=target.vocab_size,
        target_hidden_size=target.hidden_size,
        boundaries=taps.values,
        sample_from_anchor=read_flag(places, "sample_from_anchor", spark),
        max_position_embeddings=read_count(places, "max_position_embeddings", 2048),
        rope=read_rope(inner, 10_000.0),
        rms_norm_eps=read_number(places, "rms_norm_eps", 1e-6),
        hidden_act=look_up(places, "hidden_act") or "silu",
        attention_bias=read_flag(places, "attention_bias", False),
        own_embedding=EMBEDDING in shapes or sizes.hidden_size != target.hidden_size,
    )
    origin = f"boundaries {', '.join(map(str, taps.values))}: {taps.origin}"
    form: BlockFormat = "speculators" if speculators else "deepspec" if spark else "z-lab"
    return BlockDescription(config, form, (origin, *warnings), shares_lm_head)


def _is_spark(fields: Fields, shapes: Shapes) -> bool:
    """Test whether a head is a DSpark head. In files that are not of speculators, the architecture decides: by it rows
    draft the token after their own."""
    kind = fields.get("speculators_model_type")
    spark = kind == "dspark" or (kind is None and "Qwen3DSparkModel" in (fields.get("architectures") or ()))
    parts = [name for name in shapes if name.startswith(("markov_head.", "confidence_head."))]
    if parts and not spark:
        raise UnsupportedConfig(
            f"expected a DSpark head (architecture Qwen3DSparkModel) where there are {listing(parts)}: which token a"
            f" row drafts does not follow from {shown(kind or fields.get('architectures'))}"
        )
    return spark


def _shares_lm_head(places: Places, shapes: Shapes, target: DecoderConfig) -> bool:
    """Test whether a head without an output matrix can share the target's: it has its vocabulary and width."""
    whole = read_count(places, "draft_vocab_size", None) in (None, target.vocab_size)
    return whole and shapes.get("fc.weight", ())[:1] == (target.hidden_size,)


def _read_block(places: Places, target: DecoderConfig, default: int) -> dict[str, int]:
    """Read the size of the block, and the id that stands for an unknown token."""
    block = read_count(places, "block_size", default, _MOST_ROWS)
    mask = look_up(places, "mask_token_id")
    if not isinstance(mask, int) or isinstance(mask, bool) or not 0 <= mask < target.vocab_size:
        raise UnsupportedConfig(
            f"expected mask_token_id from 0 to {target.vocab_size - 1}; config.json has {shown(mask)}"
        )
    if block < 2:
        raise UnsupportedConfig(f"expected block_size of at least 2; config.json has {block}")
    return {"block_size": block, "mask_token_id": mask}


def _read_windows(inner: Fields, places: Places, layers: int, speculators: bool) -> dict[str, Any]:
    """Read window and causality of every layer. In z-lab's code windowed layers are causal, or `is_causal`
    decides for all, and windows are counted from each row; in speculators they are causal unless
    `sliding_window_non_causal`, and windows are counted from the newest token."""
    used = read_flag((inner,), "use_sliding_window", False)
    kinds = look_up((inner,), "layer_types")
    if kinds is None:
        first = read_count((inner,), "max_window_layers", 28) if used else layers
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    if not known or len(kinds) != layers:
        raise UnsupportedConfig(
            f"expected layer_types of {layers} layers, each full_attention or sliding_attention; config.json has"
            f" {shown(kinds)}"
        )
    window = as_count("sliding_window", look_up((inner,), "sliding_window") or 4096) if used else 0
    slides = [kind == "sliding_attention" for kind in kinds]
    if speculators:
        causal = [s and used and not read_flag(places, "sliding_window_non_causal", False) for s in slides]
    else:
        stated = read_flag(places, "is_causal", None)
        causal = slides if stated is None else [stated] * layers
    windows = tuple(window if s else 0 for s in slides)
    return {"sliding_windows": windows, "causal": tuple(causal), "anchored_windows": speculators or not any(windows)}


def _read_spark(places: Places) -> dict[str, Any]:
    """Read the parts that DSpark adds."""
    rank = look_up(places, "markov_rank")
    rank = 256 if rank is None else 0 if rank == 0 else as_count("markov_rank", rank)
    kind = look_up(places, "markov_head_type") or "vanilla"
    if kind not in _MARKOV:
        raise UnsupportedConfig(f"expected markov_head_type among {', '.join(_MARKOV)}; config.json has {shown(kind)}")
    confidence: Confidence = "none"
    if read_flag(places, "enable_confidence_head", True):
        confidence = "hidden and markov" if read_flag(places, "confidence_head_with_markov", True) else "hidden"
    if confidence == "hidden and markov" and not rank:
        raise UnsupportedConfig("expected a Markov head where confidence_head_with_markov is true; markov_rank is 0")
    return {"markov": kind if rank else "none", "markov_rank": rank, "confidence": confidence}


def _count_layers(places: Places, shapes: Shapes) -> int:
    """Count layers by their tensors; config.json is used where it has more, whose tensors are then missing."""
    numbers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    return max(len(numbers), read_count(places, "num_hidden_layers", 1, MOST_LAYERS))
