import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import byte_fallback_tokenizer, byte_level_tokenizer, write_json, write_tiny
from tokenizers import Tokenizer

from moespec_jax.checkpoint.tokenizer import TextStream, load_tokenizer, read_stop_ids, render_chat
from moespec_jax.errors import CheckpointError

TOKENIZERS = {"byte-level": byte_level_tokenizer(), "byte-fallback": byte_fallback_tokenizer()}
EVERY_TOKENIZER = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
# Heavy in what tokenizers split: several bytes a character, spaces, joiners, and U+FFFD itself.
TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("ab é日€🙂\u200d\ufffd"), max_size=40)
laws = hypothesis_settings(deadline=None, max_examples=200, derandomize=True)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each push of one id gives, and the flush."""
    text = TextStream(tokenizer)
    return [text.push([i]) for i in ids] + [text.flush()]


@EVERY_TOKENIZER
@laws
@given(text=TEXTS)
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@laws
@given(ids=st.lists(st.integers(0, 299), max_size=30))
def test_any_ids_stream_to_their_decoding(ids: list[int]) -> None:
    """A model may write broken UTF-8 and special tokens anywhere."""
    tokenizer = TOKENIZERS["byte-level"]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@EVERY_TOKENIZER
@laws
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_it_does_not_matter_how_ids_are_grouped(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text).ids
    edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    grouped = TextStream(tokenizer)
    groups = [grouped.push(ids[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    assert "".join(groups) + grouped.flush() == "".join(stream(tokenizer, ids))


def test_a_character_of_three_tokens_comes_whole() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = [tokenizer.token_to_id(token) for token in ("▁a", "<0xE2>", "<0x82>", "<0xAC>", "b")]
    assert stream(tokenizer, ids) == ["a", "", "", "€", "b", ""]


def test_an_unfinished_character_comes_at_the_flush() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = [tokenizer.token_to_id(token) for token in ("▁a", "<0xE2>", "<0x82>")]
    assert stream(tokenizer, ids) == ["a", "", "", "\ufffd\ufffd"]


def test_a_special_token_does_not_cost_the_space_after_it() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = [tokenizer.token_to_id(token) for token in ("<s>", "▁a", "</s>", "</s>", "▁ab")]
    assert stream(tokenizer, ids) == ["", "a", "", "", " ab", ""]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 4}, (3,)),
        ({"eos_token_id": [3, 9]}, {}, (3, 9)),
        ({"eos_token_id": None}, {"eos_token_id": 4}, (4,)),
        ({"eos_token_id": []}, {"eos_token_id": [4]}, (4,)),
        (None, {"eos_token_id": 0}, (0,)),
        (None, {}, ()),
    ],
)
def test_stop_ids(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    write_json(tmp_path / "config.json", config)
    assert read_stop_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", 1.5, True, -1, 2**31, [1, "2"], {"id": 1}])
def test_stop_ids_that_are_none(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "generation_config.json", {"eos_token_id": value})
    with pytest.raises(CheckpointError, match="expected eos_token_id to be an id or a list of ids"):
        read_stop_ids(tmp_path)


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_a_prompt_is_neither_cut_nor_padded_as_the_file_says(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.decode(loaded.encode("the cat sat on the mat").ids) == "the cat sat on the mat"


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if not enable_thinking %}<no thinking>{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("system", "thinking", "expected"),
    [
        (None, True, "[user]hi[assistant]"),
        ("be brief", True, "[system]be brief[user]hi[assistant]"),
        (None, False, "[user]hi[assistant]<no thinking>"),
    ],
)
def test_chat_prompt(tmp_path: Path, system: str | None, thinking: bool, expected: str) -> None:
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "hi"})
    assert render_chat(write_chat(tmp_path, TEMPLATE), turns, ask=True, thinking=thinking) == expected


def test_a_template_that_refuses_is_one_line(tmp_path: Path) -> None:
    directory = write_chat(tmp_path, "{{ raise_exception('roles must alternate\nalways') }}")
    with pytest.raises(CheckpointError, match="expected a chat template.*roles must alternate") as refused:
        render_chat(directory, [{"role": "user", "content": "hi"}], ask=True)
    assert "\n" not in str(refused.value)


def write_chat(directory: Path, template: str) -> Path:
    write_tiny(directory)
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory
