"""Sampling of a request: what is given, and else what the checkpoint is published with."""

import dataclasses
from typing import Any, TypedDict

from moespec_jax.checkpoint.generation_config import PublishedSampling
from moespec_jax.decoding.sampling import LogitsProcessor, SamplingConfig


class SamplingOptions(TypedDict, total=False):
    """Fields of `SamplingConfig`. One that is absent or None is as in the checkpoint's `generation_config.json`, or
    else has the default of `SamplingConfig`, which is greedy."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logits_processor: LogitsProcessor | None


# The model's most probable token, independently of `generation_config.json`.
GREEDY = SamplingOptions(temperature=0.0, repetition_penalty=1.0)


def requested_sampling(published: PublishedSampling, options: SamplingOptions) -> SamplingConfig:
    """Combine what is given with what is published.

    Raises:
        RequestError: a value has a wrong type or is out of its range.
    """
    return SamplingConfig(**{**published.options, **_given(options)})  # pyright: ignore[reportArgumentType]


def describe_sampling(
    sampling: SamplingConfig, published: PublishedSampling, options: SamplingOptions
) -> dict[str, Any]:
    """Describe a sampling for a result: its fields, which of them the checkpoint sets (`published`), and fields of
    `generation_config.json` that are not implemented (`not_applied`)."""
    fields: dict[str, Any] = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    processor = fields.pop("logits_processor")
    if processor is not None:
        fields["logits_processor"] = getattr(processor, "__qualname__", repr(processor))
    taken = sorted(published.options.keys() - _given(options).keys())
    return fields | {"published": taken, "not_applied": dict(published.not_applied)}


def _given(options: SamplingOptions) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
