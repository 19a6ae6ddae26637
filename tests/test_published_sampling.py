"""generation_config.json: what transformers would sample with, overridden field by field; and files that are wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from moespec_jax.checkpoint.generation_config import PublishedSampling, read_sampling
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.runtime.requested_sampling import GREEDY, describe_sampling, requested_sampling

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}


def published(directory: Path, fields: dict[str, Any]) -> PublishedSampling:
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return read_sampling(directory)


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        ({}, {}, SamplingConfig()),
        (QWEN3, {}, SamplingConfig(0.6, 20, 0.95)),
        (QWEN3, {"temperature": 1.0, "top_k": None}, SamplingConfig(1.0, 20, 0.95)),
        (QWEN3, {"top_k": 0, "min_p": 0.1}, SamplingConfig(0.6, 0, 0.95, 0.1)),
        # As in transformers, without do_sample the other fields wait for a caller who samples.
        (QWEN3 | {"do_sample": False}, {}, SamplingConfig(0.0, 20, 0.95)),
        ({"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.9}, SamplingConfig(0.9, 0, 0.8)),
        ({"do_sample": True}, {}, SamplingConfig(1.0)),
        ({"do_sample": True, "temperature": None, "min_p": 0.05}, {}, SamplingConfig(1.0, min_p=0.05)),
        ({"repetition_penalty": 1.05}, {}, SamplingConfig(repetition_penalty=1.05)),
        (QWEN3 | {"repetition_penalty": 1.05}, GREEDY, SamplingConfig(0.0, 20, 0.95)),
    ],
)
def test_what_is_given_is_before_what_is_published(
    tmp_path: Path, fields: dict[str, Any], options: Any, expected: SamplingConfig
) -> None:
    assert requested_sampling(published(tmp_path, fields), options) == expected


def test_a_checkpoint_without_the_file_is_greedy(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == PublishedSampling()
    assert requested_sampling(PublishedSampling(), {}).greedy


def test_the_result_names_what_the_checkpoint_sets_and_what_is_not_applied(tmp_path: Path) -> None:
    fields = QWEN3 | {"num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [5]}
    source = published(tmp_path, fields)
    described = describe_sampling(requested_sampling(source, {"top_p": 0.5}), source, {"top_p": 0.5})
    assert described["published"] == ["temperature", "top_k"]
    assert described["not_applied"] == {"num_beams": 4, "suppress_tokens": [5]}
    assert (described["temperature"], described["top_k"], described["top_p"]) == (0.6, 20, 0.5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": "warm"}, "expected temperature to be a number of at least 0 in"),
        ({"temperature": -1}, "expected temperature to be a number of at least 0 in"),
        ({"temperature": float("inf")}, "expected temperature to be a number of at least 0 in"),
        ({"top_k": 2.5}, "expected top_k to be a whole number from 0 to"),
        ({"top_k": True}, "expected top_k to be a whole number from 0 to"),
        ({"top_p": 0}, "expected top_p above 0 and at most 1 in"),
        ({"top_p": 1.5}, "expected top_p to be a number from 0 to 1 in"),
        ({"min_p": [0.1]}, "expected min_p to be a number from 0 to 1 in"),
        ({"do_sample": "yes"}, "expected do_sample to be true or false in"),
    ],
)
def test_a_wrong_field_is_refused_with_the_file(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as error:
        published(tmp_path, fields)
    assert str(error.value).startswith(says) and str(tmp_path / "generation_config.json") in str(error.value)
