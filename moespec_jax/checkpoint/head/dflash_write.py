"""Writing of DFlash and DSpark heads in the format of speculators, for vLLM. Heads that the format cannot express are
refused by name."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moespec_jax.checkpoint.head.boundaries import TAPS
from moespec_jax.checkpoint.head.dflash_config import describe_block_head
from moespec_jax.checkpoint.head.dflash_table import block_table
from moespec_jax.checkpoint.head.files import write_files
from moespec_jax.checkpoint.head.vocabulary import vocabulary_maps
from moespec_jax.checkpoint.head.write import float_tensors, layer_fields
from moespec_jax.checkpoint.write import published_fields
from moespec_jax.config import DecoderConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.dflash import DFlashHead


def export_block_draft(
    head: DFlashHead,
    config: DFlashConfig,
    directory: Path,
    *,
    target: DecoderConfig,
    dtype: DTypeLike | None = None,
    target_name: str = "",
    target_architectures: Sequence[str] = (),
    shares_lm_head: bool = False,
) -> tuple[str, ...]:
    """Write a head as `model.safetensors` and `config.json`; returns warnings to show the user.

    Args:
        head: parameters.
        config: settings.
        directory: output, made if missing.
        target: settings of the target.
        dtype: of all parameters (default: each keeps its own).
        target_name: hub id or directory of the target.
        target_architectures: `architectures` of the target's config.json (default: those this library writes).
        shares_lm_head: whether the output matrix is the target's, and so is left out.

    Raises:
        CheckpointError: the format cannot express the head, a value does not fit `dtype`, or the head's parameters are
            not those of `config`.
    """
    check_block_exportable(config)
    whole = config.draft_vocab_size == config.vocab_size
    table = block_table(config, lm_head=not (shares_lm_head and whole))
    tensors = float_tensors(head, table, None if dtype is None else jnp.dtype(dtype))
    d2t, t2d = vocabulary_maps(np.asarray(head.target_ids), config.vocab_size)
    tensors |= {} if whole else {"d2t": d2t, "t2d": t2d}
    architectures = list(target_architectures) or published_fields(target)["architectures"]
    fields = _fields(config, target_name, architectures)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    again = describe_block_head(fields, shapes, target, where="what was to be written").config
    for field in dataclasses.fields(config):
        requested, readable = getattr(config, field.name), getattr(again, field.name)
        if requested != readable:
            raise CheckpointError(
                f"expected {field.name} that speculators can express ({readable!r}); got {requested!r}"
            )
    stored_dtype = str(tensors["fc.weight"].dtype)
    write_files(directory, tensors, fields | {"dtype": stored_dtype, "torch_dtype": stored_dtype})
    own = [
        name
        for name, is_own in (
            ("embedding", config.own_embedding),
            ("output matrix", "lm_head.weight" in table and whole),
        )
        if is_own
    ]
    return tuple(
        f"the head's own {name} is written; speculators replaces it by the target's when it trains" for name in own
    )


def check_block_exportable(config: DFlashConfig) -> None:
    """Check that the format can express a head.

    Raises:
        CheckpointError: it cannot; the message names all reasons.
    """
    windowed = [bool(window) for window in config.sliding_windows]
    expressible = [causal for causal, window in zip(config.causal, windowed, strict=True) if window]
    refused = {
        "windows counted from each row": any(windowed) and not config.anchored_windows,
        "windows of unequal size": len({window for window in config.sliding_windows if window}) > 1,
        "causal layers without a window": any(c and not w for c, w in zip(config.causal, windowed, strict=True)),
        "windowed layers of which some are causal": len(set(expressible)) > 1,
        f"target_hidden_size {config.target_hidden_size}": config.target_hidden_size != config.hidden_size,
    }
    if names := [name for name, is_refused in refused.items() if is_refused]:
        raise CheckpointError(f"expected a head that the speculators format can express; it cannot: {', '.join(names)}")


def _fields(config: DFlashConfig, target_name: str, architectures: list[str]) -> dict[str, Any]:
    """Compute a config.json of speculators. Its ids are boundaries."""
    spark = config.markov != "none" or config.confidence != "none"
    windows = [window for window in config.sliding_windows if window]
    layer = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | layer_fields(config)
    layer |= {
        "layer_types": ["sliding_attention" if window else "full_attention" for window in config.sliding_windows],
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
    }
    fields: dict[str, Any] = {
        "architectures": ["DSparkSpeculator" if spark else "DFlashSpeculator"],
        "speculators_model_type": "dspark" if spark else "dflash",
        "speculators_version": "0.9.0",
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_hidden_size": None,
        TAPS: list(config.boundaries),
        "sliding_window_non_causal": not any(config.causal),
        "sample_from_anchor": config.sample_from_anchor,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "dspark" if spark else "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": config.drafted,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target_name, "architectures": architectures},
        },
    }
    if spark:
        fields |= {
            "markov_rank": config.markov_rank,
            "markov_head_type": "vanilla" if config.markov == "none" else config.markov,
            "enable_confidence_head": config.confidence != "none",
            "confidence_head_with_markov": config.confidence == "hidden and markov",
        }
    return fields
