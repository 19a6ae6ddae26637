"""Talk with a model in the terminal.

Answers are printed while they are generated. Between turns the keys and values
of the conversation are kept, so that each turn reads its own tokens only. The
conversation is written to a file after every piece of text; --conversation
FILE goes on with one. Ctrl-C ends an answer and keeps what there is of it.

The model needs a chat template. The flags of model, sampling, tree and budget
are those of python -m moespec_jax.generate.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moespec_jax.chat.record import Record, new_file
from moespec_jax.chat.settings import SETTINGS, set_value
from moespec_jax.checkpoint.chat import render
from moespec_jax.checkpoint.conversation import Conversation
from moespec_jax.cli.arguments import (
    add_model_flags,
    add_profile_flag,
    add_speculate_flag,
    add_tree_flags,
    load_requested,
    requested_spec,
)
from moespec_jax.cli.budget_flags import add_budget_flags
from moespec_jax.cli.command import command_parser, error_line, run_command, write_output
from moespec_jax.cli.prompts import read_tools_file
from moespec_jax.cli.sampling_flags import SAMPLING_OPTIONS, add_sampling_flags
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.files import expanded
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.prompt_cache import PromptCache
from moespec_jax.runtime.results import RunResult
from moespec_jax.runtime.stop_strings import VisibleText

COMMANDS = {
    "/help": "list the commands",
    "/set": "list the settings; /set temperature 0.7 changes one",
    "/stats": "print the statistics of each answer, or no longer",
    "/retry": "answer the last message, again with another seed",
    "/clear": "begin a new conversation in the same file",
    "/exit": "leave; so does the end of the input",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    spec = requested_spec(arguments)
    tools = None if arguments.tools is None else read_tools_file(expanded(arguments.tools))
    record = Record(arguments.conversation or new_file(), arguments.system, tools)
    chat = Chat(load_requested(arguments, spec.budget), spec, record, arguments)
    chat.check_template()
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history of `input`)
        print(f"{chat.model.config.model_type}; /help lists the commands; conversation: {record.path}", file=sys.stderr)
    while (line := _read_line(interactive)) is not None and line.strip() != "/exit":
        try:
            chat.obey(line) if line.startswith("/") else chat.ask(line)
        except (CheckpointError, RequestError) as error:
            print(error_line(error), file=sys.stderr)


class Chat:
    """A conversation under way."""

    def __init__(self, model: Model, spec: DecodingSpec, record: Record, arguments: argparse.Namespace) -> None:
        self.model, self._spec, self._record = model, spec, record
        self._thinking, self._stops = not arguments.no_thinking, arguments.stop or []
        names = (*SAMPLING_OPTIONS, "max_new_tokens", "seed")
        self._values: dict[str, Any] = {name: getattr(arguments, name) for name in names}
        self._cache, self._shows_statistics = PromptCache(), arguments.stats

    def check_template(self) -> None:
        """Check that the model has a chat template, which renders the tools, before anything is asked.

        Raises:
            CheckpointError: it has none, or leaves out the tools.
        """
        asked = Conversation("a test", [{"role": "user", "content": "?"}], self._record.tools)
        render(self.model.directory, asked, ask=True)

    def obey(self, line: str) -> None:
        """Run a line that begins with `/`."""
        name, *words = line.split()
        if name == "/set":
            print(set_value(self._values, words), file=sys.stderr)
        elif name == "/stats":
            self._shows_statistics = not self._shows_statistics
            print(f"statistics are {'on' if self._shows_statistics else 'off'}", file=sys.stderr)
        elif name == "/retry":
            self._retry()
        elif name == "/clear":
            self._record.clear()
        elif name == "/help":
            print("\n".join(f"{name:7} {purpose}" for name, purpose in COMMANDS.items()), file=sys.stderr)
        else:
            raise RequestError(f"expected a command among {', '.join(COMMANDS)}; got {name}")

    def ask(self, text: str) -> None:
        """Say something, and print the answer. Where there is none, the message is taken back."""
        before = len(self._record.messages)
        self._record.say("user", text)
        try:
            self._answer()
        except (CheckpointError, RequestError):
            self._record.cut(before)
            raise

    def _retry(self) -> None:
        messages = self._record.messages
        if not messages or messages[-1]["role"] not in ("user", "assistant"):
            raise RequestError("expected a message to answer; there is none")
        if messages[-1]["role"] == "assistant":
            self._record.cut(len(messages) - 1)
            self._values["seed"] = (self._values["seed"] + 1) % 2**32
        self._answer()

    def _answer(self) -> None:
        conversation = Conversation("the conversation", list(self._record.messages), self._record.tools)
        text = render(self.model.directory, conversation, ask=True, thinking=self._thinking).text
        ids = self.model.encode(text, special_tokens=False)
        printer = _Answer(self.model, ids, self._stops, self._record)
        try:
            result = self.model.generate(
                [ids], tree=self._spec.tree, budget=self._spec.budget, prompt_cache=self._cache, on_tokens=printer,
                stop=self._stops, **self._values,
            )  # fmt: skip
        except KeyboardInterrupt:
            result = None
        printer.finish()
        if result is None:
            if not printer.text:
                self._record.cut(len(self._record.messages) - 1)
            print("interrupted; the answer so far is kept, and /retry begins another", file=sys.stderr)
            return
        if self._shows_statistics:
            print(_statistics(result), file=sys.stderr)


class _Answer:
    """Prints an answer while it is generated, and writes it to the record."""

    def __init__(self, model: Model, prompt: list[int], stops: Sequence[str], record: Record) -> None:
        assert model.tokenizer is not None
        self._visible, self._record = VisibleText(model.tokenizer, prompt, stops), record
        record.say("assistant", "")

    @property
    def text(self) -> str:
        """What was printed."""
        return self._visible.text

    def __call__(self, new: list[list[int]]) -> None:
        self._show(self._visible.push(new[0]))

    def finish(self) -> None:
        """Print what was held back: bytes of an incomplete character, and the beginning of a stop string."""
        self._show(self._visible.finish())
        write_output("\n")

    def _show(self, new: str) -> None:
        write_output(new)
        self._record.replace_last(self.text)


def _statistics(result: RunResult) -> str:
    prompt = result.prompts[0]
    accepted = f", {prompt.accept_length:.2f} tokens a round" if result.drafts else ""
    exact = "exact" if result.exact else "LOSSY"
    return (
        f"{prompt.new_tokens} new tokens, {result.tokens_per_s:.1f} tokens/s{accepted}, {exact}; prompt of"
        f" {prompt.prompt_tokens} tokens, {prompt.cached_tokens} of them cached, read in"
        f" {result.prefill_s * 1e3:.0f} ms; ended by {prompt.finish_reason}"
    )


def _read_line(interactive: bool) -> str | None:
    """Read a line of the user; None at the end of the input, or at Ctrl-C. Empty lines are skipped."""
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return None
        except UnicodeDecodeError:
            raise RequestError("expected UTF-8 text on standard input; it is not UTF-8") from None
        if line.strip():
            return line


def _parser() -> argparse.ArgumentParser:
    epilog = "commands:\n" + "\n".join(f"  {name:7} {purpose}" for name, purpose in COMMANDS.items())
    parser = command_parser("chat", __doc__, f"{epilog}\nsettings: {', '.join(SETTINGS)}")
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("conversation")
    group.add_argument(
        "--conversation", type=Path, metavar="FILE", help="JSON file to go on with, or to begin (default: a new one)"
    )
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="JSON list of definitions of tools, which the template renders; a call is text of the answer",
    )
    group.add_argument(
        "--no-thinking", action="store_true", help="render the template with enable_thinking set to false"
    )
    group.add_argument("--stats", action="store_true", help="print the statistics of each answer")
    add_sampling_flags(parser, max_new_tokens=1024)
    drafting = parser.add_argument_group("speculative decoding")
    add_speculate_flag(drafting)
    add_tree_flags(drafting)
    add_profile_flag(drafting)
    add_budget_flags(parser.add_argument_group("expert budget of the verification (in general lossy)"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
