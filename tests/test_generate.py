"""The command line: what it prints, its JSON, and what a second start finds compiled."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import byte_level_tokenizer, write_json, write_tiny
from tokenizers.processors import TemplateProcessing

import moespec_jax
from moespec_jax.generate import main
from moespec_jax.runtime.load import DEMO_TARGET

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _keep_the_tests_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seen by main, which then leaves JAX's setting alone.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"))


def run(capsys: pytest.CaptureFixture[str], directory: Path, *argv: str) -> tuple[str, str]:
    assert main(["--model", str(directory), "--max-new-tokens", "12", *argv]) == 0
    return capsys.readouterr()


def run_json(capsys: pytest.CaptureFixture[str], directory: Path, *argv: str) -> dict[str, Any]:
    out, err = run(capsys, directory, "--json", *argv)
    assert err == ""
    assert out.count("\n") == 1
    return json.loads(out)


RUN_FIELDS = {
    "prompts": list,
    "experts_wanted": float,
    "experts_read": float,
    "experts_max_per_device": float,
    "mass_kept": float,
    "tokens_replaced": float,
    "exact": bool,
    "exactness": str,
    "greedy": bool,
    "sampling": dict,
    "budget": type(None),
    "tree": type(None),
    "draft_model": type(None),
    "simulated_accept_length": type(None),
    "compile_s": float,
    "prefill_s": float,
    "decode_s": float,
    "tokens_per_s": float,
    "mesh": type(None),
    "device": str,
    "dtype": str,
    "backend": str,
    "quantization": type(None),
    "versions": dict,
    "choice": type(None),
    "samples": int,
    "logprobs_of": type(None),
    "checkpoint_format": type(None),
}
PROMPT_FIELDS = {
    "text": str,
    "token_ids": list,
    "prompt_tokens": int,
    "new_tokens": int,
    "rounds": int,
    "accept_length": float,
    "accepted_by_depth": list,
    "finish_reason": str,
    "cached_tokens": int,
    "sample": int,
    "logprobs": type(None),
}


def test_json_has_the_promised_fields(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, directory, "--prompt", "the cat", "--prompt-ids", "5,6")
    assert {name: type(value) for name, value in result.items()} == RUN_FIELDS
    for prompt in result["prompts"]:
        assert {name: type(value) for name, value in prompt.items()} == PROMPT_FIELDS
        assert len(prompt["token_ids"]) == prompt["new_tokens"] and {type(i) for i in prompt["token_ids"]} == {int}
    assert [p["prompt_tokens"] for p in result["prompts"]] == [
        len(byte_level_tokenizer().encode("the cat").ids),
        2,
    ]
    assert {"jax", "moespec_jax"} <= result["versions"].keys()


def test_text_is_the_prompt_and_what_json_says(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_json(capsys, directory, "--prompt", "the cat")["prompts"][0]["text"]
    out, err = run(capsys, directory, "--prompt", "the cat")
    assert out == f"the cat{text}\n"
    for row in (
        "model",
        "device",
        "float32",
        "exact, plain decoding",
        "tie or near-tie",
        "compilation",
        "prefill",
        "tokens/s",
    ):
        assert row in err


def test_the_answer_alone(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One prompt is streamed, several are not; neither prints prompts, or anything on standard error."""
    whole = tmp_path / "prompt.py"
    whole.write_text("def add(a,\n        b")
    flags = ["--prompt", "the cat", "--prompt-text", str(whole)]
    first, second = run_json(capsys, directory, *flags)["prompts"]
    assert run(capsys, directory, *flags[:2], "--answer-only") == (first["text"] + "\n", "")
    out, err = run(capsys, directory, *flags, "--answer-only")
    assert out.splitlines()[0].startswith("--- prompt 0") and f"\n{first['text']}\n--- prompt 1 (" in out
    assert out.endswith(f")\n{second['text']}\n") and err == ""
    assert main(["--answer-only", "--json"]) == 2
    assert "expected neither --json nor --compare with it" in capsys.readouterr().err


def test_several_prompts_are_printed_apart(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--prompt", "the cat", "--prompt", "def add"]
    first, second = run_json(capsys, directory, *argv)["prompts"]
    out, _ = run(capsys, directory, *argv)
    heads = [
        f"--- prompt {i} ({p['new_tokens']} new tokens, {p['finish_reason']})" for i, p in enumerate((first, second))
    ]
    assert out == f"{heads[0]}\nthe cat{first['text']}\n{heads[1]}\ndef add{second['text']}\n"


def test_standard_input_is_a_prompt(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_flag = run_json(capsys, directory, "--prompt", "the\ncat 日本\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\ncat 日本\n"))
    assert run_json(capsys, directory, "--prompt", "-")["prompts"] == by_flag["prompts"]


def test_token_ids_need_no_tokenizer(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write_tiny(tmp_path / "bare", tokenizer=False)
    argv = ["--prompt-ids", "5,17,9", "--prompt-ids", "40,41"]
    with_text, without = run_json(capsys, directory, *argv), run_json(capsys, bare, *argv)
    assert [p["text"] for p in without["prompts"]] == [None, None]
    assert [p["token_ids"] for p in without["prompts"]] == [p["token_ids"] for p in with_text["prompts"]]
    out, _ = run(capsys, bare, "--prompt-ids", "5,17,9")
    assert out.splitlines()[1] == ",".join(map(str, without["prompts"][0]["token_ids"]))


def test_sampling_flags_arrive(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"temperature": 0.9, "top_k": 30, "top_p": 0.8, "seed": 6, "max_length": 14}
    argv = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    by_flags = run_json(capsys, directory, "--prompt", "the cat", "--ignore-eos", *argv)
    model = moespec_jax.load(str(directory))
    from_python = model.generate("the cat", max_new_tokens=12, ignore_eos=True, **settings)
    assert by_flags["prompts"][0]["token_ids"] == from_python.prompts[0].token_ids
    assert by_flags["prompts"][0]["finish_reason"] == "context"


def test_a_chat_has_the_special_tokens_of_its_template_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer that begins every text with a token must not begin a chat with it twice."""
    directory = write_tiny(tmp_path)
    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "<|end|>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    write_json(directory / "tokenizer_config.json", fields)
    plain = run_json(capsys, directory, "--prompt", "hi")["prompts"][0]
    assert plain["prompt_tokens"] == 1 + len(byte_level_tokenizer().encode("hi").ids)
    chat = run_json(capsys, directory, "--chat", "--system", "be kind", "--prompt", "hi")["prompts"][0]
    turns = byte_level_tokenizer().encode("<|end|>system: be kind\nuser: hi\nassistant:").ids
    assert chat["prompt_tokens"] == len(turns)
    as_ids = run_json(capsys, directory, "--prompt-ids", ",".join(map(str, turns)))["prompts"][0]
    assert chat["token_ids"] == as_ids["token_ids"]


def test_help_names_every_flag_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--model", "--prompt-file", "--chat", "--top-p", "--ignore-eos", "--json", "--compilation-cache"):
        assert flag in said


@pytest.mark.slow
def test_a_second_start_finds_its_programs(directory: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}

    def start() -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "moespec_jax.generate",
            "--model",
            str(directory),
            "--prompt",
            "the cat",
            "--json",
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    def programs() -> set[str]:
        return {path.name for path in (tmp_path / "moespec_jax" / "xla").iterdir()}

    first, kept = start(), programs()
    second = start()
    # By what is written, not by seconds: the programs of a tiny model compile about as fast as they load.
    assert kept and programs() == kept
    assert second["prompts"] == first["prompts"]


@pytest.mark.skipif(not Path(DEMO_TARGET).exists(), reason="the embedded model is not there")
def test_without_arguments_the_embedded_model_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--max-new-tokens", "16", "--ignore-eos", "--json"]) == 0
    prompt = json.loads(capsys.readouterr().out)["prompts"][0]
    assert prompt["new_tokens"] == 16 and prompt["text"]
