"""Whatever is wrong with what the caller gave: exit status 2, one line that begins `error: `, nothing on stdout."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import CONFIG, CONTEXT, tiny_tensors, write_json, write_tiny

from moespec_jax.generate import main

ROOT = Path(__file__).parent.parent
ROUTER = "model.layers.1.mlp.gate.weight"

# Spoils the checkpoint in this directory, or writes the files that the arguments name.
Spoil = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _keep_the_tests_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seen by main, which then leaves JAX's setting alone.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a run that must be refused in exactly the promised form."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def config(**changes: Any) -> Spoil:
    return lambda d: write_json(d / "config.json", CONFIG | changes)


def without(*names: str) -> Spoil:
    return lambda d: write_json(d / "config.json", {k: v for k, v in CONFIG.items() if k not in names})


def text(name: str, content: str | bytes) -> Spoil:
    return lambda d: (d / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Spoil:
    return lambda d: (d / name).unlink()


def tensors(**changes: np.ndarray | None) -> Spoil:
    """Replaces, adds or (None) drops tensors; `__` stands for a dot."""
    edited = {name.replace("__", "."): value for name, value in changes.items()}

    def spoil(d: Path) -> None:
        kept = {name: value for name, value in (tiny_tensors() | edited).items() if value is not None}
        save_file(kept, d / "model.safetensors")

    return spoil


def shard(edit: Callable[[bytes], bytes]) -> Spoil:
    return lambda d: (d / "model.safetensors").write_bytes(edit((d / "model.safetensors").read_bytes()))


def index(file: str) -> Spoil:
    """An index in place of the whole file, which would count before it."""
    text = json.dumps({"weight_map": {ROUTER: file}})
    return lambda d: (d / "model.safetensors").rename(d / "model.safetensors.index.json").write_text(text)


def only_pickle(d: Path) -> None:
    (d / "model.safetensors").rename(d / "pytorch_model.bin")


def doubled(d: Path) -> None:
    (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors")
    save_file({ROUTER: tiny_tensors()[ROUTER]}, d / "model-00002-of-00002.safetensors")


# What is wrong with the checkpoint, how to make it so, and what the line must say: what was expected, what came, where.
CHECKPOINTS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no config.json": (remove("config.json"), ("expected a file config.json", "there is none")),
    "config.json is not JSON": (text("config.json", "{model_type: x"), ("expected JSON", "config.json")),
    "config.json is not text": (text("config.json", b"\xff\xfe\x00"), ("expected JSON", "config.json")),
    "config.json is a list": (text("config.json", "[1]"), ("expected a JSON object", "config.json", "list")),
    "config.json is nested endlessly": (text("config.json", "[" * 200_000), ("expected JSON", "config.json")),
    "config.json is huge": (lambda d: os.truncate(d / "config.json", 1 << 30), ("JSON of at most", str(1 << 30))),
    "config.json is a directory": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        ("expected", "config.json"),
    ),
    "no model_type": (without("model_type"), ("expected a model_type among", "None")),
    "unsupported architecture": (config(model_type="llama"), ("expected a model_type among", "qwen3_moe", "'llama'")),
    "model_type is a list": (config(model_type=["qwen3_moe"]), ("expected a model_type among", "['qwen3_moe']")),
    "missing field": (without("num_experts_per_tok"), ("lacks the field 'num_experts_per_tok'", "config.json")),
    "size is a text": (config(hidden_size="32"), ("expected hidden_size to be an integer", "'32'")),
    "size is a fraction": (config(hidden_size=32.5), ("expected hidden_size to be an integer", "32.5")),
    "size is negative": (config(num_hidden_layers=-2), ("expected num_hidden_layers", "-2")),
    "size is zero": (config(num_experts=0), ("expected num_experts", "0")),
    "size is absurd": (config(vocab_size=10**15), ("expected vocab_size", str(10**15))),
    "layers are absurd": (config(num_hidden_layers=10**6), ("expected num_hidden_layers", str(10**6))),
    "experts are absurd": (config(num_hidden_layers=2000, num_experts=10**4), ("num_hidden_layers", "num_experts")),
    "experts are not there": (config(num_experts=1 << 14), ("expected 98304 matrices of experts", "got 4")),
    "more active experts than experts": (config(num_experts_per_tok=5), ("num_experts_per_tok 5", "num_experts 4")),
    "heads do not divide": (config(num_key_value_heads=3), ("num_attention_heads 4", "num_key_value_heads 3")),
    "odd head": (config(head_dim=7), ("expected an even head_dim", "7")),
    "epsilon is a text": (config(rms_norm_eps="tiny"), ("expected rms_norm_eps", "'tiny'")),
    "epsilon is no number": (config(rms_norm_eps=float("nan")), ("expected rms_norm_eps", "nan")),
    "flag is a text": (config(tie_word_embeddings="false"), ("expected tie_word_embeddings", "'false'")),
    "unknown activation": (config(hidden_act="relu6"), ("expected hidden_act among", "'relu6'")),
    "layer_types of other length": (config(layer_types=["full_attention"]), ("expected layer_types", "2 layers")),
    "window is a text": (config(use_sliding_window=True, sliding_window="all"), ("expected sliding_window", "'all'")),
    "unknown rope": (config(rope_parameters={"rope_type": "longrope"}), ("expected rope_type", "'longrope'")),
    "rope is a text": (config(rope_parameters="default"), ("expected rope_parameters to be an object", "'default'")),
    "attention in chunks": (config(dual_chunk_attention_config={"chunk_size": 24}), ("dual_chunk_attention_config",)),
    "rope factor is a text": (
        config(rope_parameters={"rope_type": "linear", "factor": "two"}),
        ("expected factor", "'two'"),
    ),
    "rope theta is negative": (config(rope_parameters={"rope_theta": -1.0}), ("expected rope_theta", "-1.0")),
    "quantized": (
        config(quantization_config={"quant_method": "hqq"}),
        ("quantization_config", "expected the unquantized checkpoint", "hqq"),
    ),
    "truncated shard": (shard(lambda b: b[:-100]), ("expected a whole safetensors file", "model.safetensors")),
    "shard cut in its header": (shard(lambda b: b[:50]), ("expected a whole safetensors file", "model.safetensors")),
    "empty shard": (shard(lambda b: b""), ("expected a whole safetensors file", "model.safetensors")),
    "garbage shard": (shard(lambda b: b"\xff" * 999), ("expected a whole safetensors file", "model.safetensors")),
    "no weights": (remove("model.safetensors"), ("expected *.safetensors", "neither")),
    "weights as a pickle only": (only_pickle, ("expected *.safetensors", "pytorch_model.bin")),
    "index names a missing shard": (index("gone.safetensors"), ("expected gone.safetensors", "no such shard")),
    "index points elsewhere": (
        index("../model.safetensors"),
        ("expected *.safetensors beside", "../model.safetensors"),
    ),
    "index points to the root": (index("/etc/passwd"), ("expected *.safetensors beside", "/etc/passwd")),
    "index names a name too long": (index("x" * 300 + ".safetensors"), ("expected xxx", "no such shard")),
    "index names a directory": (index(".."), ("expected", "..")),
    "index without a map": (text("model.safetensors.index.json", "{}"), ("expected an object 'weight_map'",)),
    "tensor in two shards": (doubled, ("doubly assigned", ROUTER, "model-00002-of-00002")),
    "missing tensor": (tensors(model__norm__weight=None), ("1 missing: model.norm.weight",)),
    "unknown tensor": (tensors(model__extra=np.zeros(3, np.float32)), ("1 unknown: model.extra",)),
    "misshapen tensor": (
        tensors(model__norm__weight=np.zeros(31, np.float32)),
        ("model.norm.weight (expected [32], got [31])",),
    ),
    "tensor of integers": (
        tensors(model__norm__weight=np.zeros(32, np.int8)),
        ("not F32, F16 or BF16", "model.norm.weight (I8)"),
    ),
    "broken tokenizer": (text("tokenizer.json", '{"model": 3}'), ("expected a tokenizer", "tokenizer.json")),
    "no tokenizer": (remove("tokenizer.json"), ("expected token ids (--prompt-ids)", "has no tokenizer")),
    "broken generation_config.json": (text("generation_config.json", "{"), ("expected JSON", "generation_config.json")),
    "eos_token_id is a text": (
        text("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("expected eos_token_id", "'</s>'"),
    ),
    "eos_token_id is huge": (
        text("generation_config.json", f'{{"eos_token_id": {2**40}}}'),
        ("expected eos_token_id", str(2**40)),
    ),
}


@pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(("spoil", "says"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_bad_checkpoint(
    spoil: Spoil, says: Sequence[str], json_flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_tiny(tmp_path / "model")
    spoil(directory)
    line = refused(["--model", str(directory), "--prompt", "the cat", *json_flag], capsys)
    for words in (*says, str(directory)):
        assert words in line


LONG = ",".join(["5"] * CONTEXT)
IDS = ["--prompt-ids", "5,6"]
CHAIN = ["--tree-depth", "2", "--tree-top-k", "1", "--tree-size"]
# Arguments beside --model, and what the line must say.
REQUESTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "prompt fills the context": (["--prompt-ids", LONG], (f"shorter than the context of {CONTEXT}", f"has {CONTEXT}")),
    "prompt fills max_length": ([*IDS, "--max-length", "2"], ("shorter than the context of 2", "prompt 0 has 2")),
    "second prompt is empty": (["--prompt", "a", "--prompt", ""], ("at least one token", "prompt 1 is empty")),
    "prompt is not UTF-8": (["--prompt", "\udcff"], ("expected a prompt of valid UTF-8", "\\udcff")),
    "id above the vocabulary": (["--prompt-ids", "5,320"], ("token ids from 0 to 319", "prompt 0 holds 320")),
    "id beyond 64 bits": (["--prompt-ids", "9" * 30], ("token ids from 0 to 319", "9" * 30)),
    "negative id": (["--prompt-ids=-1"], ("token ids from 0 to 319", "prompt 0 holds -1")),
    "id is no number": (["--prompt-ids", "5,x"], ("expected --prompt-ids like 5,17,9", "'5,x'")),
    "no new tokens": ([*IDS, "--max-new-tokens", "0"], ("max_new_tokens of at least 1", "got 0")),
    "fewer than no new tokens": ([*IDS, "--max-new-tokens=-5"], ("max_new_tokens of at least 1", "got -5")),
    "new tokens are a text": ([*IDS, "--max-new-tokens", "many"], ("--max-new-tokens", "'many'")),
    "max_length above the context": ([*IDS, "--max-length", "97"], ("max_length from 2 to", "context of 96", "got 97")),
    "max_length of one": ([*IDS, "--max-length", "1"], ("expected max_length from 2", "got 1")),
    "temperature below zero": ([*IDS, "--temperature=-0.1"], ("expected a temperature", "got -0.1")),
    "temperature is nan": ([*IDS, "--temperature", "nan"], ("expected a temperature", "got nan")),
    "temperature is infinite": ([*IDS, "--temperature", "inf"], ("expected a temperature", "got inf")),
    "top-p of zero": ([*IDS, "--top-p", "0"], ("expected top_p above 0", "got 0.0")),
    "top-p above one": ([*IDS, "--top-p", "1.5"], ("top_p above 0 and at most 1", "got 1.5")),
    "top-p is nan": ([*IDS, "--top-p", "nan"], ("expected top_p", "got nan")),
    "top-k below zero": ([*IDS, "--top-k=-1"], ("expected top_k of at least 0", "got -1")),
    "seed below zero": ([*IDS, "--seed=-1"], ("expected a seed from 0", "got -1")),
    "seed beyond 64 bits": ([*IDS, "--seed", str(2**70)], ("expected a seed from 0", str(2**70))),
    "unknown flag": ([*IDS, "--top-q", "1"], ("--top-q", "--help")),
    "abbreviated flag": ([*IDS, "--temp", "1"], ("--temp", "--help")),
    "flag without a value": ([*IDS, "--seed"], ("--seed", "expected one argument")),
    "unknown dtype": ([*IDS, "--dtype", "int4"], ("--dtype", "int4", "bfloat16")),
    "revision of a directory": ([*IDS, "--revision", "main"], ("expected a hub id with --revision main", "directory")),
    "chat without a template": (["--prompt", "a", "--chat"], ("expected a chat template", "no chat template")),
    "system turn without chat": (["--prompt", "a", "--system", "b"], ("--system", "expected --chat")),
    "prompt file is missing": (["--prompt-file", "{d}/gone"], ("expected a file of prompts", "gone", "No such file")),
    "prompt file is a directory": (["--prompt-file", "{d}"], ("expected a file of prompts", "directory")),
    "prompt file is empty": (["--prompt-file", "{d}/empty"], ("expected a file of prompts", "empty; it is empty")),
    "prompt file is not UTF-8": (["--prompt-file", "{d}/latin1"], ("expected a file of prompts", "not UTF-8")),
    "prompt file without turns": (["--prompt-file", "{d}/q.jsonl"], ("'turns' in line 2 of", "q.jsonl")),
    "tree without a head": ([*IDS, "--tree-depth", "7"], ("--tree-depth", "expected --draft-model")),
    "head not in the cache": ([*IDS, "--draft-model", "a/b"], ("'a/b'", "local cache", "HF_HUB_OFFLINE")),
    "head that is a target": ([*IDS, "--draft-model", "{d}"], ("expected", "head", "{d}")),
    "chain that is too long": ([*IDS, "--draft-model", "a/b", *CHAIN, "9"], ("tree size of at most 4", "got 9")),
    "tree of one": ([*IDS, "--draft-model", "a/b", *CHAIN, "1"], ("size at least 2", "size 1")),
    "top-k of zero": ([*IDS, "--draft-model", "a/b", "--tree-top-k", "0"], ("top-k at least 1", "top-k 0")),
    "boundaries of letters": ([*IDS, "--draft-model", "a/b", "--draft-boundaries", "1,x"], ("2,24,45", "'1,x'")),
    "simulation without a head": ([*IDS, "--simulate-accept-length", "2"], ("--simulate", "expected --draft-model")),
    "comparison without a head": ([*IDS, "--compare"], ("--compare", "expected --draft-model")),
    "trace without a head": ([*IDS, "--trace", "{d}/trace.jsonl"], ("--trace", "expected --draft-model")),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny(tmp_path_factory.mktemp("good"))
    (directory / "empty").touch()
    (directory / "latin1").write_bytes("naïve".encode("latin-1"))
    (directory / "q.jsonl").write_text('{"turns": ["fine"]}\n{"question": "not so"}\n')
    return directory


@pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(("arguments", "says"), REQUESTS.values(), ids=REQUESTS.keys())
def test_bad_request(
    arguments: list[str], says: Sequence[str], json_flag: list[str], good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The flag first: one case ends in a flag that lacks its value.
    argv = [*json_flag, "--model", str(good), *(a.replace("{d}", str(good)) for a in arguments)]
    line = refused(argv, capsys)
    for words in says:
        assert words.replace("{d}", str(good)) in line


# Names of models, and what the line must say. The tests run with HF_HUB_OFFLINE=1 and an empty cache.
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wrong path": ("./no/such/directory", ("there is no directory ./no/such/directory",)),
    "deep path": ("no/such/directory", ("there is no directory no/such/directory",)),
    "file": (__file__, ("expected a model directory", f"{__file__} is a file")),
    "empty name": ("", ("neither a directory here nor a valid hub id", "''")),
    "invalid hub id": ("owner/na me", ("'owner/na me'", "nor a valid hub id")),
    "name of two lines": ("owner/na\nme", ("nor a valid hub id",)),
    "name too long": ("x" * 5000, ("expected a model directory or hub id", "too long")),
    "unknown home": ("~nobody-of-this-name/model", ("expected a model directory or hub id", "home")),
    "hub id not in the cache": (
        "owner/never-downloaded",
        ("'owner/never-downloaded'", "local cache", "HF_HUB_OFFLINE"),
    ),
}


@pytest.mark.parametrize(("model", "says"), MODELS.values(), ids=MODELS.keys())
def test_bad_model(model: str, says: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["--model", model, *IDS], capsys)
    for words in says:
        assert words in line


def test_hub_id_not_in_the_cache_when_told_to_stay_offline(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["--model", "owner/never-downloaded", "--offline", *IDS], capsys)
    assert "'owner/never-downloaded'" in line and "(--offline)" in line


def test_standard_input_that_is_not_text(
    good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "input").write_bytes(b"\xff\xfe")
    with (tmp_path / "input").open(encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "UTF-8" in refused(["--model", str(good), "--prompt", "-"], capsys)


@pytest.mark.slow_except("text")
@pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_goes_away_is_no_error(good: Path, json_flag: list[str]) -> None:
    command = [sys.executable, "-m", "moespec_jax.generate", "--model", str(good), "--prompt", "the cat", *json_flag]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        run = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(good: Path) -> None:
    command = [sys.executable, "-m", "moespec_jax.generate", "--model", str(good), "--json", *IDS]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr == "error: expected to write to standard output; No space left on device\n"


def test_the_good_checkpoint_is_good(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the cases above spoil works as long as it is not spoiled."""
    assert main(["--model", str(good), "--max-new-tokens", "2", "--json", *IDS]) == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["prompts"][0]["new_tokens"] == 2
