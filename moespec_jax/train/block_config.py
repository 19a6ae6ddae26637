"""Settings of a DFlash or DSpark head to train, from flags and the target; sizes that heads of all kinds choose
alike."""

import argparse
from typing import Any

from moespec_jax.checkpoint.head.boundaries import even_taps
from moespec_jax.config import DecoderConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import parse_numbers
from moespec_jax.train.arguments import MARKOV_RANK, SPARK_FLAGS, VARIANTS


def block_config(arguments: argparse.Namespace, target: DecoderConfig) -> DFlashConfig:
    """Build the settings of the head: attention has the target's shape, and the boundaries are, as in z-lab's heads,
    the outputs of as many layers as the head has, evenly from 1 to L - 3.

    Raises:
        RequestError: a size or the mask token is out of range, or the boundaries do not increase.
        CheckpointError: the boundaries are not numbers.
    """
    if unused := [name for name in (*VARIANTS, "qk_norm") if getattr(arguments, name)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise RequestError(f"expected flags of a DFlash head; {flags} are an EAGLE-3 head's")
    layers, mask, own = target.num_hidden_layers, arguments.mask_token_id, arguments.layers or 5
    mask = target.vocab_size - 1 if mask is None else mask
    if arguments.block_size < 2 or not 0 <= mask < target.vocab_size:
        raise RequestError(
            f"expected --block-size of at least 2 and --mask-token-id from 0 to {target.vocab_size - 1}; got"
            f" {arguments.block_size} and {mask}"
        )
    if arguments.boundaries is None:
        # Fewer where a small target has not as many between.
        values = tuple(sorted({min(max(tap, 0), layers - 1) + 1 for tap in even_taps(layers, own)}))
    else:
        values = parse_numbers(arguments.boundaries, "--boundaries")
    if list(values) != sorted(set(values)) or values[0] < 0 or values[-1] > layers:
        raise RequestError(
            f"expected strictly increasing boundaries from 0 to {layers}; got {', '.join(map(str, values))}"
            " (--boundaries)"
        )
    return DFlashConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocabulary_size(arguments, target),
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=arguments.intermediate_size or dense_size(target),
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        boundaries=values,
        block_size=arguments.block_size,
        mask_token_id=mask,
        sliding_windows=(0,) * own,
        causal=(False,) * own,
        max_position_embeddings=target.context_length,
        rms_norm_eps=target.rms_norm_eps,
        hidden_act=target.hidden_act,
        **spark_fields(arguments),
    )


def spark_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Choose the fields of `DFlashConfig` that a DSpark head adds; none for other heads.

    Raises:
        RequestError: a head of another kind has flags of these parts, or the parts do not fit each other.
    """
    given = {name: value for name in SPARK_FLAGS if (value := getattr(arguments, name)) is not None}
    if arguments.head != "dspark":
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise RequestError(f"expected --head dspark with {flags}; got --head {arguments.head}")
        return {}
    markov = given.get("markov", "vanilla")
    confidence = given.get("confidence", "hidden" if markov == "none" else "hidden+markov")
    refused = [
        ("--confidence hidden+markov", confidence == "hidden+markov"),
        ("--markov-rank", "markov_rank" in given),
    ]
    if markov == "none" and (names := [name for name, is_given in refused if is_given]):
        raise RequestError(f"expected a Markov part with {', '.join(names)}; got --markov none")
    if confidence == "none" and "confidence_weight" in given:
        raise RequestError("expected an estimate of acceptance with --confidence-weight; got --confidence none")
    rank = 0 if markov == "none" else given.get("markov_rank", MARKOV_RANK)
    # The newest token's row drafts too, as in DeepSpec's and speculators' DSpark heads.
    return {
        "sample_from_anchor": True,
        "markov": markov,
        "markov_rank": rank,
        "confidence": confidence.replace("+", " and "),
    }


def draft_vocabulary_size(arguments: argparse.Namespace, target: DecoderConfig) -> int:
    """Choose the size of the draft vocabulary: as asked for, else 32000 or all of a smaller vocabulary.

    Raises:
        RequestError: it is larger than the target's.
    """
    size = arguments.draft_vocab_size or min(32_000, target.vocab_size)
    if size > target.vocab_size:
        raise RequestError(f"expected a draft vocabulary of at most {target.vocab_size} tokens; got {size}")
    return size


def dense_size(target: DecoderConfig) -> int:
    """Choose the width of the head's MLP: that of the target's dense MLPs, or without them three times the hidden size,
    as in speculators."""
    dense, expert = target.intermediate_size, target.moe_intermediate_size
    return dense if dense != expert else 3 * target.hidden_size
