"""Turns of a conversation are answered one after another, each with the answers before it in its prompt."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from chats import PLAIN, write_chat_model
from tiny import byte_level_tokenizer, write_tiny

import moespec_jax
from moespec_jax.generate import main
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.request import sequence_limits
from moespec_jax.runtime.results import PromptResult, RunResult, joined
from moespec_jax.runtime.token_logprobs import LikelyToken, TokenLogprob

TURNS = ["hi", "well?", "so?"]


@pytest.fixture(autouse=True)
def _keep_the_tests_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"), PLAIN)


def batch_result(answers: list[PromptResult], *, first: bool) -> RunResult:
    """Result of the first batch, which is lossy, or of a later one."""
    means = (4.0, 2.0, 2.0, 0.5, 0.25) if first else (8.0, 4.0, 4.0, 1.0, 0.75)
    tail = (None, None, None, None, 1.0, 2.0, 4.0, 1.0, None, "cpu", "float32", None, "switch", {})
    return RunResult(answers, *means, not first, "words", True, {"published": [], "not_applied": {}}, *tail)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Texts of the prompts of each batch; the answer to a prompt counts its tokens, and nothing is decoded."""
    seen: list[list[str]] = []

    def generate(self: Model, prompts: list[list[int]], *, seed: int, **_: Any) -> RunResult:
        texts = [self.decode(ids) or "" for ids in prompts]
        sequence_limits(self.config, prompts, 4, None)
        seen.append(texts)
        answers = [PromptResult(f"{len(ids)} tokens", [1, 2], len(ids), 2, 1, 2.0, [1.0], "length") for ids in prompts]
        return batch_result(answers, first=len(seen) == 1)

    monkeypatch.setattr(Model, "generate", generate)
    return seen


def generate(capsys: pytest.CaptureFixture[str], directory: Path, file: Path, *argv: str) -> str:
    assert main(["--model", str(directory), "--max-new-tokens", "4", "--prompt-file", str(file), *argv]) == 0
    return capsys.readouterr().out


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_turn_sees_the_answers_before_it(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batches: list[list[str]]
) -> None:
    """Several prompts: those with a turn left form the next batch."""
    rows = [{"turns": ["alone"]}, {"turns": TURNS}, {"messages": [{"role": "user", "content": "hi"}]}]
    result = json.loads(generate(capsys, directory, write(tmp_path / "q.jsonl", *rows), "--json"))
    first, second, third = batches
    assert first == ["alone", "[user]hi\n[assistant]", "[user]hi\n[assistant]"]
    answers = [result["prompts"][place]["text"] for place in result["conversations"][1]]
    assert second == [f"[user]hi\n[assistant]{answers[0]}\n[user]well?\n[assistant]"]
    assert third == [f"{second[0]}{answers[1]}\n[user]so?\n[assistant]"]
    assert result["conversations"] == [[0], [1, 2, 3], [4]] and len(result["prompts"]) == 5
    assert len(set(answers)) == 3


def test_batches_of_turns_have_one_result(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batches: list[list[str]]
) -> None:
    """Times add up, means are over rounds, and what is lossy in one batch is lossy."""
    result = json.loads(generate(capsys, directory, write(tmp_path / "q.jsonl", {"turns": TURNS}), "--json"))
    assert [result[name] for name in ("compile_s", "prefill_s", "decode_s")] == [3.0, 6.0, 12.0]
    assert result["tokens_per_s"] == 3 / 12 and result["exact"] is False
    assert result["experts_wanted"] == pytest.approx((4 + 8 + 8) / 3)
    assert result["mass_kept"] == pytest.approx(2.5 / 3) and len(batches) == 3


@pytest.mark.parametrize(
    ("predicted", "total"), [([0.5, 0.25, 1.0], 1.75), ([None, 0.25, 1.0], None), ([0.5], 0.5), (["none", 0.25], None)]
)
def test_rounds_that_chose_their_shape_are_those_of_all_batches(predicted: list[Any], total: float | None) -> None:
    """The first batch may be too short to measure costs in, or draft a tree; the costs are the last one's."""
    answer = PromptResult("a", [1, 2], 3, 2, 1, 2.0, [1.0], "length")
    results = [batch_result([answer], first=number == 0) for number in range(len(predicted))]
    for number, (result, seconds) in enumerate(zip(results, predicted, strict=True)):
        if seconds != "none":
            costs = {"predicted_s": seconds, "source": f"file {number}"}
            result.choice = {"rounds": {"plain": number, "4/2/1": 10 + number}} | costs
    chose = [number for number, seconds in enumerate(predicted) if seconds != "none"]
    rounds = {"plain": sum(chose), "4/2/1": 10 * len(chose) + sum(chose)}
    expected = {"rounds": rounds, "predicted_s": total, "source": f"file {chose[-1]}"}
    assert joined(results, [(number, 0) for number in range(len(results))]).choice == expected


def test_a_token_of_probability_0_has_null_in_json(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logit is -inf, as float16 may give one: JSON does not have its logarithm."""
    excluded, likely = LikelyToken(7, "b", -math.inf), TokenLogprob(5, "a", -0.25, [LikelyToken(5, "a", -0.25)])
    answer = PromptResult("a", [5], 3, 1, 1, 2.0, [1.0], "length", logprobs=[likely])
    likely.top.append(excluded)
    monkeypatch.setattr(Model, "generate", lambda self, prompts, **_: batch_result([answer], first=False))
    out = generate(capsys, directory, write(tmp_path / "q.jsonl", {"turns": ["hi"]}), "--json", "--logprobs", "2")
    (token,) = json.loads(out, parse_constant=pytest.fail)["prompts"][0]["logprobs"]
    assert token["logprob"] == -0.25 and [other["logprob"] for other in token["top"]] == [-0.25, None]


def test_every_answer_is_printed(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batches: list[list[str]]
) -> None:
    file = write(tmp_path / "q.jsonl", {"turns": ["alone"]}, {"turns": TURNS[:2]})
    lines = generate(capsys, directory, file, "--prompt-ids", "5,6").splitlines()
    heads = [line.partition(" (")[0] for line in lines if line.startswith("---")]
    assert heads == ["--- prompt 0", "--- prompt 1, turn 0", "--- prompt 1, turn 1", "--- prompt 2"]
    assert lines[3] == "hi" and lines[6] == "well?"
    assert sum(line.endswith(" tokens") for line in lines) == 4 and len(batches) == 2


@pytest.mark.parametrize("row", [{"turns": ["hi"]}, {"messages": [{"role": "user", "content": "hi"}]}])
def test_one_turn_has_the_result_it_had(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batches: list[list[str]], row: Any
) -> None:
    result = json.loads(generate(capsys, directory, write(tmp_path / "q.jsonl", row), "--json"))
    assert "conversations" not in result and len(result["prompts"]) == len(batches) == 1


@pytest.mark.slow
def test_sampled_turns_are_those_of_asking_again(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "q.jsonl", {"turns": TURNS})
    result = json.loads(generate(capsys, directory, file, "--json", "--temperature", "1", "--seed", "3"))
    model, text = moespec_jax.load(str(directory)), ""
    for turn, (said, answer) in enumerate(zip(TURNS, result["prompts"], strict=True)):
        text += f"[user]{said}\n[assistant]"
        ids = byte_level_tokenizer().encode(text, add_special_tokens=False).ids
        alone = model.generate([ids], max_new_tokens=4, temperature=1.0, seed=3 + turn).prompts[0]
        assert answer["token_ids"] == alone.token_ids and answer["prompt_tokens"] == len(ids)
        text += f"{alone.text}\n"


@pytest.mark.parametrize(
    ("template", "turns", "argv", "said"),
    [
        (False, TURNS, [], "expected a chat template"),
        (True, TURNS, ["--compare", "--draft-model", "gone"], "got several turns in line 1 of"),
        (True, ["hi", "x" * 300], [], "in turn 2 of the conversations"),
    ],
)
def test_turns_that_cannot_be_answered_are_one_line(
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    template: bool,
    turns: Any,
    argv: Any,
    said: str,
) -> None:
    model = directory if template else write_tiny(tmp_path / "bare")
    file = write(tmp_path / "q.jsonl", {"turns": turns})
    assert main(["--model", str(model), "--max-new-tokens", "4", "--prompt-file", str(file), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
