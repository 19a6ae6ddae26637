"""Mutated tokenizers, prompts, profiles, ledgers and training data, and directories through the command line: one line
and status 2, or a right result. Checkpoints are in test_mutated_inputs.py, heads in test_mutated_heads.py."""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import bounded_examples, damaged, json_files, outcome, size_of
from tiny import CONFIG, byte_level_tokenizer, write_json, write_tiny

from moespec_jax.checkpoint.parameters import abstract_decoder
from moespec_jax.checkpoint.read import load_config
from moespec_jax.checkpoint.tokenizer import load_tokenizer, read_stop_ids, render_chat
from moespec_jax.cli.prompts import encode_prompt, gather_prompts, parse_prompt_ids
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.answers import read_questions
from moespec_jax.generate import main
from moespec_jax.measure.ledger import Ledger
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.tuned_profile import FORMAT, read_profile
from moespec_jax.train.records import read_samples

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def _keep_the_tests_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A model without parameters: nothing here runs one."""
    directory = write_tiny(tmp_path / "model")
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    write_json(directory / "tokenizer_config.json", fields)
    config, backend, kind = load_config(directory), BACKENDS["switch"], jnp.dtype("float32")
    nothing = abstract_decoder(config, backend, kind)
    return Model(config, nothing, backend, kind, byte_level_tokenizer(), (), directory)


def test_tokenizer(model: Model) -> None:
    """A tokenizer that passes encodes a text, or says that it cannot."""
    file = model.directory / "tokenizer.json"
    good = json.loads(file.read_text())
    small = good | {"model": good["model"] | {"vocab": dict(list(good["model"]["vocab"].items())[:270]), "merges": []}}

    @bounded_examples(60)
    @given(json_files(small))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        tokenizer = outcome(lambda: load_tokenizer(model.directory), len(data))
        if tokenizer is not None:
            model.tokenizer = tokenizer
            ids = outcome(lambda: model.encode("the cat\nsat"), len(data))
            assert ids is None or all(isinstance(i, int) for i in ids)

    check()


def test_generation_config(model: Model) -> None:
    file = model.directory / "generation_config.json"

    @bounded_examples(40)
    @given(json_files({"eos_token_id": [0, 5], "temperature": 0.6, "pad_token_id": None}))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        ids = outcome(lambda: read_stop_ids(model.directory), len(data))
        assert ids is None or all(type(i) is int and 0 <= i < 2**31 for i in ids)

    check()


PARTS = ["{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages[0].content }}", "{{ 1 / 0 }}", "{{"]
PARTS += [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception('no') }}",
]
PARTS += [
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "\x00",
]
PARTS += [
    "{{ self.__init__.__globals__ }}",
    "{{ undefined.field }}",
    "{% set x = cycler('a') %}",
    "{% import 'os' %}",
    "%}",
]


def test_chat_template(model: Model) -> None:
    """A template is somebody's program: it runs in transformers' sandbox, and gives a text or a line."""
    file = model.directory / "chat_template.jinja"
    hello = [{"role": "user", "content": "hello"}]
    render_chat(model.directory, hello, ask=True)

    @bounded_examples(40)
    @given(st.lists(st.sampled_from(PARTS), max_size=4).map("".join))
    def check(template: str) -> None:
        from moespec_jax.checkpoint.tokenizer import _transformers_tokenizer

        _transformers_tokenizer.cache_clear()
        file.write_text(template)
        text = outcome(lambda: render_chat(model.directory, hello, ask=True), size_of(model.directory))
        assert text is None or ("root:" not in text and "subclasses" not in text)

    check()


NUMBERS = st.integers() | st.sampled_from([2**31, 10**400, "9" * 5000, "0x5", "٣", " 7", "1_0", ""])
QUESTION = {"question_id": 1, "turns": ["def add(a, b):", "and now?"], "reference": ["return 3"], "test": "assert True"}


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_prompt_file(suffix: str, model: Model, tmp_path: Path) -> None:
    """Prompts that pass are texts, and their ids are those of the tokenizer."""
    file = tmp_path / f"prompts{suffix}"
    asked = argparse.Namespace(prompt=None, prompt_text=None, prompt_file=[str(file)], prompt_ids=None)

    @bounded_examples(40)
    @given(json_files(QUESTION), st.sampled_from([b"\n", b"\r\n", b"\x00", b"\n\n\n", b"\xe2\x80\xa8"]))
    def check(data: bytes, end: bytes) -> None:
        file.write_bytes(data + end + data)
        prompts = outcome(lambda: gather_prompts(asked, io.StringIO().read), 2 * len(data))
        for prompt in prompts or []:
            ids = outcome(lambda prompt=prompt: encode_prompt(model, prompt, chat=False), 20 * len(data) + 200)
            assert ids is None or max(ids, default=0) < 320
        outcome(lambda: read_questions(file, run_code=False), 2 * len(data))

    check()


@bounded_examples(40)
@given(st.text(max_size=40) | st.lists(NUMBERS, min_size=1).map(lambda numbers: ",".join(map(str, numbers))))
def test_prompt_ids(text: str) -> None:
    ids = outcome(lambda: parse_prompt_ids(text), len(text))
    assert ids is None or ids == [int(part) for part in text.split(",")]


PROFILE = {"format": FORMAT, "tree": {"depth": 2, "top_k": 3, "size": 8}, "device": "cpu", "budget": None}
RULE = {"experts": [2, 4], "coverage": "substitute", "anchor": "root", "mass": 0.9, "min_kept_weight": 0}
RULE_IN_OLDER_NAMES = {"experts": 0.5, "coverage": "guarantee", "guarantee": 0.0, "faithfulness": 0.5}


@pytest.mark.parametrize("budget", [None, RULE, RULE_IN_OLDER_NAMES])
def test_profile(budget: dict[str, Any] | None, model: Model, tmp_path: Path) -> None:
    """What passes are a tree and a budget that a model can be asked for."""
    file = tmp_path / "profile.json"

    def asked(config: DecoderConfig) -> bool:
        found = read_profile(file)
        assert found["tree"] is None or isinstance(found["tree"], TreeConfig)
        try:
            if found["budget"] is not None:
                hash(resolve(found["budget"], config))
        except ValueError as error:
            raise RequestError(str(error)) from None
        return True

    @bounded_examples(50)
    @given(json_files(PROFILE | {"budget": budget}))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        outcome(lambda: asked(model.config), len(data))

    check()
    assert isinstance(BudgetConfig(2), BudgetConfig)


@st.composite
def ledgers(draw: st.DrawFn) -> bytes:
    """A ledger with one of its lines mutated, or its bytes damaged."""
    lines = [{"asked": {"model": "m"}}, {"task": "a", "value": {"x": 1.5}}, {"task": "b", "value": [1, 2]}]
    if draw(st.booleans()):  # with older names
        lines[1] = {"piece": "a", "value": {"experts_loaded": 1.5, "coverage": "guarantee"}}
    texts = [json.dumps(line).encode() for line in lines]
    if draw(st.booleans()):
        return draw(damaged(b"\n".join(texts) + b"\n"))
    number = draw(st.integers(0, 2))
    texts[number] = draw(json_files(lines[number]))
    return b"\n".join(texts) + b"\n"


def test_ledger(tmp_path: Path) -> None:
    """A ledger that passes goes on, and what is put into it comes back."""
    file = tmp_path / "ledger.jsonl"

    @bounded_examples(60)
    @given(ledgers())
    def check(data: bytes) -> None:
        file.write_bytes(data)
        ledger = outcome(lambda: Ledger(file, {"model": "m"}), len(data))
        if ledger is None:
            assert file.read_bytes() == data
        else:
            assert ledger.task("new", lambda: [3]) == [3] and Ledger(file, {"model": "m"}).get("new") == [3]

    check()


RECORDS: dict[str, dict[str, Any]] = {
    "text": {"text": "the cat sat", "id": 7},
    "chat": {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]},
    "ids": {"prompt_ids": [5, 17], "response_ids": [9, 2]},
    "calls": {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "why?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "so"},
            {"role": "assistant", "content": "so", "weight": 1},
        ],
    },
    "ShareGPT": {
        "system": "be kind",
        "conversations": [
            {"from": "human", "value": "why?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "gpt", "value": "so"},
        ],
    },
}


@pytest.mark.parametrize("kind", RECORDS)
def test_training_data(kind: str, model: Model, tmp_path: Path) -> None:
    """Samples that pass hold ids of the vocabulary, and a mask as long."""
    file = tmp_path / "data.jsonl"
    write_json(file, RECORDS["chat"])
    list(read_samples(model, file))

    @bounded_examples(25)
    @given(json_files(RECORDS[kind]))
    def check(data: bytes) -> None:
        file.write_bytes(json.dumps(RECORDS[kind]).encode() + b"\n" + data)
        for sample in outcome(lambda: list(read_samples(model, file)), 40 * len(data)) or []:
            assert sample.ids.shape == sample.counts.shape
            assert not sample.ids.size or 0 <= sample.ids.min() <= sample.ids.max() < 320

    check()


# Files of a directory, and what is in them; all go through the whole command.
SPOILED: dict[str, Callable[[], Any]] = {
    "config.json": lambda: CONFIG,
    "generation_config.json": lambda: {"eos_token_id": 0},
    "tokenizer.json": lambda: json.loads(byte_level_tokenizer().to_str()),
    "model.safetensors.index.json": lambda: {"weight_map": {"model.norm.weight": "model.safetensors"}},
}


@pytest.mark.parametrize("name", SPOILED)
def test_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_tiny(tmp_path)
    argv = ["--model", str(directory), "--prompt-ids", "5,6", "--max-new-tokens", "2", "--json"]

    @bounded_examples(6)
    @given(json_files(SPOILED[name]()))
    def check(data: bytes) -> None:
        (directory / name).write_bytes(data)
        status = main(argv)
        out, err = capsys.readouterr()
        if status == 0:
            assert json.loads(out)["prompts"][0]["new_tokens"] in (1, 2)
        else:
            assert status == 2 and out == "" and err.startswith("error: expected") or "config.json" in err
            assert err.count("\n") == 1 and err.strip().isprintable() and len(err) < 2100

    check()
