"""A conversation in the terminal: each prompt holds the text before it, and reads only what is new; nothing is lost."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from chats import PLAIN, QWEN3, write_chat_model

from moespec_jax.chat.__main__ import main
from moespec_jax.checkpoint.tokenizer import render_chat
from moespec_jax.errors import RequestError
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model


@pytest.fixture(autouse=True)
def _keep_the_tests_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"), PLAIN, max_position_embeddings=1024)


class Talk:
    def __init__(self, directory: Path, file: Path, monkeypatch: Any, capsys: Any) -> None:
        self.directory, self.file, self._monkeypatch, self._capsys = directory, file, monkeypatch, capsys

    def __call__(self, *lines: str, flags: tuple[str, ...] = (), status: int = 0) -> tuple[str, str]:
        self._monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        flags = ("--model", str(self.directory), "--conversation", str(self.file), "--max-new-tokens", "6", *flags)
        assert main(flags) == status
        return tuple(self._capsys.readouterr())

    @property
    def messages(self) -> list[dict[str, str]]:
        return json.loads(self.file.read_text())["messages"]


@pytest.fixture
def talk(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    return Talk(directory, tmp_path / "talk.json", monkeypatch, capsys)


def test_five_turns_are_those_of_whole_prompts(talk: Talk, directory: Path) -> None:
    """Answers equal those to the rendered conversation; after the first, most of each prompt is cached."""
    said = ["hello", "and then?", "why", "no", "good"]
    out, err = talk(*said, flags=("--stats", "--temperature", "0.9"))
    model, turns = load(directory), []
    for text in said:
        turns.append({"role": "user", "content": text})
        ids = model.encode(render_chat(directory, turns, ask=True), special_tokens=False)
        answer = model.generate([ids], max_new_tokens=6, temperature=0.9).prompts[0].text
        turns.append({"role": "assistant", "content": answer})
    assert talk.messages == turns
    assert out == "".join(turn["content"] + "\n" for turn in turns[1::2])
    cached = [int(line.split(" of them cached")[0].split()[-1]) for line in err.splitlines() if "cached" in line]
    assert len(cached) == 5 and cached[0] == 0 and all(a < b for a, b in zip(cached, cached[1:], strict=False))


def test_a_conversation_goes_on_in_another_process(talk: Talk) -> None:
    talk("one", flags=("--system", "be brief"))
    talk("two")
    roles = [message["role"] for message in talk.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_commands(talk: Talk) -> None:
    out, err = talk(
        "/set temperature 0.7", "/set", "/help", "one", "/retry", "/stats", "/clear", "two", "/exit", "three"
    )
    assert "temperature 0.7" in err and "/clear" in err and "statistics are on" in err
    assert len(out.splitlines()) == 3 and err.count("new tokens,") == 1
    assert [message["content"] for message in talk.messages if message["role"] == "user"] == ["two"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/sett x", "error: expected a command among /help"),
        ("/set heat 1", "error: expected /set NAME VALUE, with a name among temperature"),
        ("/set top-k 1.5", "error: expected a whole number for top-k; got '1.5'"),
        ("/retry", "error: expected a message to answer; there is none"),
    ],
)
def test_a_wrong_line_is_one_error_and_the_conversation_goes_on(talk: Talk, line: str, says: str) -> None:
    out, err = talk(line, "hello")
    assert says in err and len(talk.messages) == 2 and out


def test_a_value_that_sampling_refuses_takes_the_message_back(talk: Talk) -> None:
    _, err = talk("/set top-p 7", "one", "/set top-p 0.9", "two")
    assert "error: expected top_p above 0 and at most 1, got 7.0" in err
    assert [message["content"] for message in talk.messages][::2] == ["two"]


def test_an_interrupted_answer_is_kept(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a terminal that is killed, the file holds every text that was printed."""
    generate = Model.generate

    def interrupted(self: Model, *arguments: Any, on_tokens: Any, **options: Any) -> Any:
        def stop_after_some(new: list[list[int]]) -> None:
            on_tokens(new)
            if talk.messages[-1]["content"]:
                raise KeyboardInterrupt

        return generate(self, *arguments, on_tokens=stop_after_some, **options)

    monkeypatch.setattr(Model, "generate", interrupted)
    out, err = talk("hello", "again")
    assert "interrupted" in err and [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert out == "".join(m["content"] + "\n" for m in talk.messages[1::2]) and len(out) > 2


def test_tools_are_rendered_and_kept(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """In the file too, from which a later call has them; a template without them is refused at once."""
    tools = [{"type": "function", "function": {"name": "weather"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    flags = ("--tools", str(tmp_path / "tools.json"))
    directory = write_chat_model(tmp_path / "model", QWEN3, max_position_embeddings=1024)
    talk = Talk(directory, tmp_path / "talk.json", monkeypatch, capsys)
    _, err = talk("hello", flags=(*flags, "--stats"))
    asked = render_chat(directory, [{"role": "user", "content": "hello"}], ask=True, tools=tools)
    assert f"prompt of {len(load(directory).encode(asked, special_tokens=False))} tokens" in err
    talk("again")
    assert json.loads(talk.file.read_text())["tools"] == tools and len(talk.messages) == 4
    plain = Talk(write_chat_model(tmp_path / "plain", PLAIN), tmp_path / "other.json", monkeypatch, capsys)
    assert "it leaves out the tools" in plain("hello", flags=flags, status=2)[1]


def test_messages_are_a_prompt_in_python(directory: Path) -> None:
    model, turns = load(directory), [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]
    ids = model.encode(render_chat(directory, turns, ask=True), special_tokens=False)
    answers = [model.generate(prompt, max_new_tokens=5).prompts[0] for prompt in (turns, [ids])]
    assert answers[0].token_ids == answers[1].token_ids and answers[0].prompt_tokens == len(ids)
    with pytest.raises(RequestError, match="expected turns with a role of .*turn 2 of the messages has 'wizard'"):
        model.generate([*turns[:1], {"role": "wizard", "content": "hi"}])


def test_without_a_chat_template_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conversation", str(tmp_path / "talk.json")]) == 2
    assert "expected a chat template in" in capsys.readouterr().err and not (tmp_path / "talk.json").exists()


def test_a_file_without_a_conversation_is_refused(talk: Talk) -> None:
    talk.file.write_text('{"text": "hello"}')
    _, err = talk("hello", status=2)
    assert err.startswith("error: expected a JSON object with 'messages' in ") and err.count("\n") == 1
