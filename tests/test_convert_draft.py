"""The head converter: between the formats and back is the same bytes, errors are a line."""

import sys
from pathlib import Path

import pytest
from draft_heads import MODEL, eagle_fields, head_tensors, specforge_fields, write_head
from safetensors.numpy import load_file
from tiny import CONFIG, tiny_tensors, write_tiny

import convert
from convert import draft
from moespec_jax.files import read_json

SIZES = dict(hidden_size=MODEL, vocab_size=40, num_hidden_layers=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A target of the size the synthetic heads are for."""
    return write_tiny(tmp_path / "model", tokenizer=False, architectures=["Qwen3MoeForCausalLM"], **SIZES)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        convert.run(draft.main)
    return int(stopped.value.code or 0)


def convert_head(mp: pytest.MonkeyPatch, model: Path, head: Path, output: Path, format: str, *more: object) -> Path:
    assert run(mp, "--model", model, "--draft-model", head, "--output", output, "--format", format, *more) == 0
    return output


def test_to_vllm_and_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = head_tensors()
    head = write_head(tmp_path / "head", eagle_fields(), tensors)
    vllm = convert_head(monkeypatch, model, head, tmp_path / "vllm", "speculators", "--target-name", "a/b")
    assert "note: boundaries 2, 4, 5: " in capsys.readouterr().err
    written = load_file(vllm / "model.safetensors")
    embedding = tiny_tensors(CONFIG | SIZES)["model.embed_tokens.weight"]
    assert written["embed_tokens.weight"].tobytes() == embedding.tobytes()
    verifier = read_json(vllm / "config.json")["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "a/b", "architectures": ["Qwen3MoeForCausalLM"]}
    back = load_file(convert_head(monkeypatch, model, vllm, tmp_path / "back", "specforge") / "model.safetensors")
    assert back.pop("embed_tokens.weight").tobytes() == embedding.tobytes()
    assert back.keys() == tensors.keys() and all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_dtype_and_boundaries_as_asked_for(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = write_head(tmp_path / "head", eagle_fields(), head_tensors(), torch=True)
    asked = ("--dtype", "bfloat16", "--boundaries", "1,4,8")
    output = convert_head(monkeypatch, model, head, tmp_path / "out", "specforge", *asked)
    fields = read_json(output / "config.json")
    assert fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 3, 7] and fields["dtype"] == "bfloat16"
    assert str(load_file(output / "model.safetensors")["fc.weight"].dtype) == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        (eagle_fields(vocab_size=41), [], "a vocabulary of 40"),
        (eagle_fields(), ["--boundaries", "x"], "--boundaries as numbers"),
        (eagle_fields(), ["--boundaries", "0,4,5"], "boundary 0"),
        (specforge_fields(norm_before_residual=True), [], "norm_before_residual"),
        (eagle_fields(), ["--format", "gguf"], "invalid choice"),
    ],
)
def test_errors_are_a_line_and_leave_nothing(
    fields: dict,
    arguments: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    head, output = write_head(tmp_path / "head", fields, head_tensors()), tmp_path / "out"
    plain = ("--model", model, "--draft-model", head, "--output", output, "--format", "specforge")
    assert run(monkeypatch, *plain, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not output.exists() and not output.with_name("out.incomplete").exists()
