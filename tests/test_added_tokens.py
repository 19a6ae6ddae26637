"""Tokens beyond `tokenizer.json`: those of other files, and those to which the model has no row."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_level_tokenizer, write_json, write_tiny
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from moespec_jax.checkpoint.tokenizer import load_tokenizer
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.runtime.load import load

PLAIN = byte_level_tokenizer()
SIZE = PLAIN.get_vocab_size()
TEXT = "the <think>cat</think> sat"


def write(directory: Path, **files: Any) -> Path:
    """A tokenizer beside further files, `__` for a dot in their names."""
    directory.mkdir(parents=True, exist_ok=True)
    PLAIN.save(str(directory / "tokenizer.json"))
    for name, fields in files.items():
        write_json(directory / name.replace("__", "."), fields)
    return directory


def loaded(directory: Path) -> Tokenizer:
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def stated(number: int, text: str, **flags: bool) -> dict[str, Any]:
    return {str(number): {"content": text, "special": False, "normalized": False} | flags}


# Files that add the same two tokens.
FILES: dict[str, dict[str, Any]] = {
    "added_tokens": {"added_tokens__json": {"</think>": SIZE + 1, "<think>": SIZE}},
    "tokenizer_config": {
        "tokenizer_config__json": {
            "added_tokens_decoder": stated(0, "<|end|>", special=True)
            | stated(SIZE + 1, "</think>")
            | stated(SIZE, "<think>")
        }
    },
    "special": {
        "added_tokens__json": {"<think>": SIZE, "</think>": SIZE + 1},
        "special_tokens_map__json": {"additional_special_tokens": ["<think>", "</think>"]},
    },
}


@pytest.mark.parametrize("name", FILES)
def test_tokens_of_other_files_are_tokens(name: str, tmp_path: Path) -> None:
    ids = loaded(write(tmp_path, **FILES[name])).encode(TEXT).ids
    assert (ids.count(SIZE), ids.count(SIZE + 1)) == (1, 1)
    assert SIZE not in PLAIN.encode(TEXT).ids
    assert loaded(tmp_path).decode(ids, skip_special_tokens=name != "special") == (
        TEXT if name != "special" else loaded(tmp_path).decode(ids, skip_special_tokens=False)
    )


@pytest.mark.parametrize("name", FILES)
def test_tokens_of_other_files_as_in_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = write(tmp_path, **FILES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))
    assert loaded(directory).encode(TEXT).ids == theirs(TEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("template", [False, True])
def test_tokenizer_json_says_which_tokens_a_text_begins_and_ends_with(
    kind: str, template: bool, tmp_path: Path
) -> None:
    """`add_bos_token` and `add_eos_token` were of tokenizers without one: transformers ignores them beside it."""
    transformers = pytest.importorskip("transformers")
    tokenizer, end = byte_level_tokenizer(), "<|end|>"
    if template:
        number = tokenizer.token_to_id(end)
        tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, number)])
    for flags in ({}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}):
        names = {"tokenizer_class": kind, "bos_token": end, "eos_token": end}
        directory = write(tmp_path / "".join(flags), tokenizer_config__json=names | flags)
        tokenizer.save(str(directory / "tokenizer.json"))
        write_json(directory / "config.json", {"model_type": "qwen3_moe"})
        ids = loaded(directory).encode(TEXT).ids
        assert ids == transformers.AutoTokenizer.from_pretrained(str(directory))(TEXT)["input_ids"]
        assert (ids[0] == tokenizer.token_to_id(end)) == template


def test_an_ordinary_token_may_be_declared_an_added_one(tmp_path: Path) -> None:
    """It then is a token wherever it stands, as transformers has it, and keeps its id."""
    the = PLAIN.token_to_id("the")
    assert PLAIN.encode("bathe").ids.count(the) == 0
    declared = {"tokenizer_config__json": {"added_tokens_decoder": stated(the, "the")}}
    tokenizer = loaded(write(tmp_path, **declared))
    assert tokenizer.encode("bathe").ids.count(the) == 1 and tokenizer.get_vocab_size() == SIZE


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gap": (
        {"added_tokens__json": {"<pad>": SIZE + 7}},
        rf"the id {SIZE + 7} for '<pad>', .*; added to .* it has",
    ),
    "order": (
        {"tokenizer_config__json": {"added_tokens_decoder": stated(SIZE, "<a>") | stated(SIZE + 2, "<b>")}},
        f"the id {SIZE + 2} for '<b>'",
    ),
    "no id": ({"added_tokens__json": {"<pad>": "last"}}, "expected added tokens with their ids"),
    "no token": ({"tokenizer_config__json": {"added_tokens_decoder": {"7": {"text": "x"}}}}, "added tokens with their"),
    "no object": ({"tokenizer_config__json": {"added_tokens_decoder": 3}}, "added_tokens_decoder to be an object"),
    "list": ({"tokenizer_config__json": {"added_tokens_decoder": {"7": [1]}}}, "added tokens with their ids"),
}


@pytest.mark.parametrize("what", WRONG)
def test_tokens_that_cannot_have_their_ids_are_refused(what: str, tmp_path: Path) -> None:
    files, message = WRONG[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(write(tmp_path, **files))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("joined", [False, True])
def test_merges_in_another_file_are_missed(joined: bool, tmp_path: Path) -> None:
    fields = json.loads(PLAIN.to_str())
    pairs = fields["model"]["merges"]
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in pairs]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), encoding="utf-8")
    fields["model"]["merges"] = pairs if joined else []
    write_json(tmp_path / "tokenizer.json", fields)
    if joined:
        assert loaded(tmp_path).encode(TEXT).ids == PLAIN.encode(TEXT).ids
        return
    with pytest.raises(CheckpointError, match=r"expected the merges of .*merges.txt in .*tokenizer.json; it has none"):
        load_tokenizer(tmp_path)


def test_only_a_token_that_is_used_needs_a_row(tmp_path: Path) -> None:
    """Fine-tunes add a `<pad>` for which the embedding has no row; transformers runs them."""
    model = load(str(write_tiny(tmp_path / "plain")))
    larger = write_tiny(tmp_path / "larger")
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(model.config.vocab_size - SIZE)])
    tokenizer.add_special_tokens(["<pad>", "<more>"])
    tokenizer.save(str(larger / "tokenizer.json"))
    other = load(str(larger))
    assert other.encode(TEXT) == model.encode(TEXT)
    for token, number in (("<pad>", 320), ("<more>", 321)):
        with pytest.raises(RequestError, match=f"the model's vocabulary of 320; .* has '{token}' as {number}"):
            other.encode(f"the {token} cat")
