"""Writing of draft heads in the formats of SpecForge, for SGLang, and of speculators, for vLLM.

Heads that a format, or the engine that reads it, would compute differently are refused by name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moespec_jax.checkpoint.head.boundaries import IDS
from moespec_jax.checkpoint.head.config import describe_head
from moespec_jax.checkpoint.head.files import write_files
from moespec_jax.checkpoint.head.tensor_table import EMBEDDING, draft_table, layer_number, layer_prefix, leaf_at
from moespec_jax.checkpoint.head.vocabulary import vocabulary_maps
from moespec_jax.checkpoint.leaves import cast
from moespec_jax.checkpoint.parameters import final_shape
from moespec_jax.checkpoint.tensor_table import Tensor
from moespec_jax.checkpoint.write import published_fields
from moespec_jax.config import DecoderConfig, DraftConfig, RopeConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.nn.eagle3 import DraftHead

ExportFormat = Literal["specforge", "speculators"]
FORMATS: tuple[ExportFormat, ...] = ("specforge", "speculators")

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
)
# Fields of each scaling that readers require even where they have their defaults.
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def export_draft(
    head: DraftHead,
    config: DraftConfig,
    directory: Path,
    format: ExportFormat = "specforge",
    *,
    target: DecoderConfig,
    dtype: DTypeLike | None = None,
    target_name: str = "",
    target_architectures: Sequence[str] = (),
    target_embedding: jax.Array | np.ndarray | None = None,
    speculative_tokens: int = 3,
) -> tuple[str, ...]:
    """Write a head as `model.safetensors` and `config.json`; returns warnings to show the user.

    Args:
        head: parameters.
        config: settings.
        directory: output, made if missing.
        format: format of the files.
        target: settings of the target.
        dtype: of all parameters (default: each keeps its own).
        target_name: hub id or directory of the target; speculators only, as are all below.
        target_architectures: `architectures` of the target's config.json (default: those this library writes).
        target_embedding: the target's embedding `[vocab, model]`, required for a head without one: the format always
            includes one.
        speculative_tokens: number of tokens that vLLM drafts by default.

    Raises:
        CheckpointError: the format cannot express the head, an embedding is required, a value does not fit `dtype`, or
            the head's parameters are not those of `config`.
    """
    if format not in FORMATS:
        raise CheckpointError(f"expected a format among {', '.join(FORMATS)}; got {format!r}")
    check_exportable(config, format)
    table = draft_table(config, o_bias=any(layer.attention.o_bias is not None for layer in head.layers))
    tensors = float_tensors(head, table, None if dtype is None else jnp.dtype(dtype))
    fields = _specforge_fields(config)
    if format == "speculators":
        tensors = _for_speculators(tensors, config, target_embedding, dtype)
        architectures = list(target_architectures) or published_fields(target)["architectures"]
        fields = _speculators_fields(config, target_name, architectures, speculative_tokens)
    d2t, t2d = vocabulary_maps(np.asarray(head.target_ids), config.vocab_size)
    if format == "specforge" or config.draft_vocab_size < config.vocab_size:
        tensors |= {"d2t": d2t, "t2d": t2d}
    stored_dtype = str(tensors["fc.weight"].dtype)
    _check_reads_back(fields, tensors, config, target, format)
    published = {_published_name(name, format): tensor for name, tensor in tensors.items()}
    write_files(directory, published, fields | {"dtype": stored_dtype, "torch_dtype": stored_dtype})
    return _warnings(config, format, target.num_hidden_layers)


def check_exportable(config: DraftConfig, format: ExportFormat) -> None:
    """Check that a format can express a head, and that its engine computes it.

    Raises:
        CheckpointError: it cannot; the message names all reasons, and the format that can, if one does.
    """
    if names := _inexpressible(config, format):
        others = [f"choose the format {other} (--format)" for other in FORMATS if not _inexpressible(config, other)]
        change = others[0] if others else "no format can; train a head without them"
        raise CheckpointError(
            f"expected a head that the {format} format can express; it cannot: {', '.join(names)}: {change}"
        )


def _inexpressible(config: DraftConfig, format: ExportFormat) -> list[str]:
    """List the settings of a head that a format cannot express."""
    refused = {
        "norm_before_residual": format == "specforge" and config.norm_before_residual,
        "norm_before_fc": format == "specforge" and config.norm_before_fc,
        # SpecForge defines the flag differently from SGLang, which runs its heads.
        "norm_output": format == "specforge" and config.norm_output,
        "attention_bias": format == "specforge" and config.attention_bias,
        "fc_bias": format == "speculators" and config.fc_bias,
        f"qk_norm {config.qk_norm}": config.qk_norm == "flat" or (format == "specforge" and config.qk_norm != "none"),
        f"num_hidden_layers {config.num_hidden_layers}": format == "specforge" and config.num_hidden_layers > 1,
        f"{len(config.boundaries)} boundaries": len(config.boundaries) != 3,
        "boundary 0 (the embedding)": format == "specforge" and 0 in config.boundaries,
    }
    return [name for name, is_refused in refused.items() if is_refused]


def float_tensors(
    head: DraftHead | DFlashHead, table: Mapping[str, Tensor], dtype: np.dtype | None
) -> dict[str, np.ndarray]:
    """Copy all float parameters to the host, in published orientation, by the names of their table."""
    tensors = {}
    for name, tensor in table.items():
        leaf, shape = leaf_at(head, tensor.path), final_shape(tensor)
        if leaf is None or leaf.shape != shape:
            found = "none" if leaf is None else f"one of {list(leaf.shape)}"
            raise CheckpointError(f"expected a parameter {name} kept as {list(shape)}; the head has {found}")
        array = np.asarray(leaf)
        array = array if dtype is None else cast(array, dtype, name)
        tensors[name] = np.ascontiguousarray(tensor.reorient(array))
    return tensors


def _for_speculators(
    tensors: dict[str, np.ndarray], config: DraftConfig, embedding: Any, dtype: DTypeLike | None
) -> dict[str, np.ndarray]:
    """Add tensors that vLLM requires: an embedding, and a bias of `o` where q, k and v have biases."""
    added = {}
    if EMBEDDING not in tensors:
        shape = (config.vocab_size, config.hidden_size)
        if embedding is None or embedding.shape != shape:
            found = "none" if embedding is None else f"one of {list(embedding.shape)}"
            raise CheckpointError(
                f"expected the target's embedding {list(shape)} for the speculators format; got {found}"
            )
        array = np.ascontiguousarray(np.asarray(embedding))
        added[EMBEDDING] = array if dtype is None else cast(array, jnp.dtype(dtype), EMBEDDING)
    if config.attention_bias:
        for i in range(config.num_hidden_layers):
            name = f"{layer_prefix(i)}self_attn.o_proj.bias"
            if name not in tensors:
                added[name] = np.zeros(config.hidden_size, tensors["fc.weight"].dtype)
    return tensors | added


def _specforge_fields(config: DraftConfig) -> dict[str, Any]:
    """Compute a config.json of SpecForge. Its ids are layers whose outputs the head reads: one below the boundaries."""
    fields: dict[str, Any] = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    fields |= layer_fields(config)
    fields |= {
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_config": {IDS: [b - 1 for b in config.boundaries], "use_aux_hidden_state": True},
    }
    # Written only where they differ from the default: engines test for the presence of the keys.
    if config.fc_norm:
        fields["fc_norm"] = True
    if config.fc_bias:
        fields["bias"] = True
    if config.target_hidden_size != config.hidden_size:
        fields["target_hidden_size"] = config.target_hidden_size
    return fields


def _speculators_fields(
    config: DraftConfig, target_name: str, architectures: list[str], speculative_tokens: int
) -> dict[str, Any]:
    """Compute a config.json of speculators. Its ids are boundaries."""
    qwen3 = config.qk_norm == "head"
    layer = {"architectures": ["Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLM"]}
    layer |= {"model_type": "qwen3" if qwen3 else "llama"} | layer_fields(config)
    narrower = config.target_hidden_size != config.hidden_size
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": speculative_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "target_hidden_size": config.target_hidden_size if narrower else None,
        IDS: list(config.boundaries),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target_name, "architectures": architectures},
        },
    }


def layer_fields(config: DraftConfig | DFlashConfig) -> dict[str, Any]:
    """Compute fields of sizes and rotary settings, the latter in the spellings of transformers 4 and 5."""
    rope = _rope_fields(config.rope)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {name: getattr(config, name) for name in _SIZES} | {
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": config.rope.rope_theta,
        "rope_scaling": None if config.rope.rope_type == "default" else scaling,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _rope_fields(rope: RopeConfig) -> dict[str, Any]:
    default = RopeConfig()
    names = [field.name for field in dataclasses.fields(rope)]
    required = ("rope_type", "rope_theta", *_ROPE_REQUIRED[rope.rope_type])
    return {n: getattr(rope, n) for n in names if n in required or getattr(rope, n) != getattr(default, n)}


def _check_reads_back(
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    config: DraftConfig,
    target: DecoderConfig,
    format: ExportFormat,
) -> None:
    """Check that the fields and shapes to be written read back as `config`."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    again = describe_head(fields, shapes, target, where="what was to be written").config
    for field in dataclasses.fields(config):
        requested, readable = getattr(config, field.name), getattr(again, field.name)
        if requested != readable and not (field.name == "own_embedding" and format == "speculators"):
            raise CheckpointError(f"expected {field.name} that {format} can express ({readable!r}); got {requested!r}")


def _published_name(name: str, format: ExportFormat) -> str:
    layer = layer_number(name)
    if format == "specforge" or layer is None:
        return name
    return f"layers.{layer}.{name.removeprefix(layer_prefix(layer))}"


def _warnings(config: DraftConfig, format: ExportFormat, layers: int) -> tuple[str, ...]:
    if format != "specforge":
        return ()
    first, last, warnings = config.boundaries[0], config.boundaries[-1], []
    if first != 2:
        warnings.append(
            f"the first tapped layer is {first - 1}; recent SGLang takes ids that do not start at 1 for"
            " boundaries, and would tap one layer too low"
        )
    if last == layers:
        warnings.append(
            f"the last tapped layer is {last - 1}, the target's last; SGLang taps what enters a layer, and would not"
            " pass its output to the head"
        )
    return tuple(warnings)
