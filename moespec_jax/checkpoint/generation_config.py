"""Sampling that a checkpoint is published with: `generation_config.json`, as transformers reads it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moespec_jax.checkpoint.config_fields import shown
from moespec_jax.errors import CheckpointError
from moespec_jax.files import read_json

# Fields that are applied, with the least and the largest value of each.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, math.inf), "top_k": (0, 2**31 - 1), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, math.inf),
}  # fmt: skip
# Fields that would change the text too, with the values at which they do not; null is one of every field.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": (),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,),
    "diversity_penalty": (0.0,), "penalty_alpha": (0.0,), "guidance_scale": (1.0,), "sequence_bias": ({}, []),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "min_length": (0,),
    "min_new_tokens": (0,), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "stop_strings": ([],),
}  # fmt: skip


class PublishedSampling(NamedTuple):
    """Sampling that a checkpoint sets.

    Fields:
        options: fields of `SamplingConfig` that the file sets; its temperature is 0 unless `do_sample` is true.
        not_applied: fields of the file that would change the text and are not implemented.
    """

    options: Mapping[str, float] = {}
    not_applied: Mapping[str, Any] = {}


def read_sampling(directory: Path) -> PublishedSampling:
    """Read the sampling of a checkpoint directory; greedy where it has no `generation_config.json`.

    Raises:
        CheckpointError: the file cannot be read, or a field has a wrong type or is out of its range.
    """
    file = directory / "generation_config.json"
    if not file.exists():
        return PublishedSampling()
    fields = read_json(file)
    options = {name: _number(file, name, fields[name]) for name in _RANGES if fields.get(name) is not None}
    if options.get("top_p") == 0.0:  # as transformers' own warper refuses it
        raise CheckpointError(f"expected top_p above 0 and at most 1 in {file}; it is 0")
    do_sample = fields.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise CheckpointError(f"expected do_sample to be true or false in {file}; it is {shown(do_sample)}")
    if not do_sample:
        options.pop("temperature", None)
    elif "temperature" not in options:
        options["temperature"] = 1.0
    asked = {name: fields[name] for name in _NEUTRAL if fields.get(name) is not None}
    not_applied = {name: value for name, value in asked.items() if value not in _NEUTRAL[name]}
    return PublishedSampling(options, not_applied)


def _number(file: Path, name: str, value: Any) -> float:
    least, largest = _RANGES[name]
    kinds = int if name == "top_k" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= largest or math.isinf(value):
        expected = "a whole number" if name == "top_k" else "a number"
        bound = f"from {least:g} to {largest:g}" if math.isfinite(largest) else f"of at least {least:g}"
        raise CheckpointError(f"expected {name} to be {expected} {bound} in {file}; it is {shown(value)}")
    return value
