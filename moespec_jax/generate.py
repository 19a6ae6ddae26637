"""Generate text with a Mixture-of-Experts model, plainly or by speculative decoding.

With a draft head or a drafter by name (--draft-model), each round drafts a tree
of tokens, verifies it in one forward pass of the target model and commits the
accepted tokens. The output is exact: it is the model's own. An expert budget
(--expert-budget) limits the experts that a verification reads: this saves
memory traffic, and in general makes the output lossy.

Without arguments: the embedded pair, a small target and its draft head that are
part of this package, on a built-in prompt. The text goes to standard output, a
table of statistics to standard error.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from moespec_jax.cli.arguments import load_requested, requested_spec
from moespec_jax.cli.command import run_command, write_output
from moespec_jax.cli.compare import compare
from moespec_jax.cli.dialogue import answer_turns
from moespec_jax.cli.generate_arguments import (
    build_parser,
    check_flags,
    check_processes,
    check_turns,
)
from moespec_jax.cli.process_flags import join_processes
from moespec_jax.cli.prompts import Prompt, chat_text, encode_prompt, gather_prompts, parse_prompt_ids, read_tools_file
from moespec_jax.cli.round_trace import tracing
from moespec_jax.cli.sampling_flags import SAMPLING_OPTIONS
from moespec_jax.cli.summary import NAME_WIDTH, statistics_table
from moespec_jax.cli.wide_table import folded
from moespec_jax.decoding.round_info import RoundInfo
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded, json_line
from moespec_jax.parallel.processes import all_or_none, is_first_process, same_everywhere
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import RunResult
from moespec_jax.runtime.stop_strings import VisibleText


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    return run_command(build_parser(__doc__), _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    check_flags(arguments)
    join_processes(arguments)
    check_processes(arguments)
    spec = requested_spec(arguments)
    asked, ids = gather_prompts(arguments, sys.stdin.read), [parse_prompt_ids(p) for p in arguments.prompt_ids or []]
    check_turns(arguments, asked)
    model = load_requested(arguments, spec.budget)
    first = is_first_process()
    shows_notes = first and arguments.draft_model is not None and not (arguments.json or arguments.answer_only)
    if shows_notes and model.draft is not None and model.draft.notes:
        print("\n".join(model.draft.notes), file=sys.stderr)
    tools = None if arguments.tools is None else read_tools_file(expanded(arguments.tools))
    chat: Any = dict(chat=arguments.chat, system=arguments.system, thinking=not arguments.no_thinking, tools=tools)
    encode = functools.partial(encode_prompt, model, **chat)
    prompts = [encode(prompt) for prompt in asked] + ids
    if not same_everywhere(json.dumps([prompts, arguments.max_new_tokens, arguments.seed, arguments.samples])):
        raise RequestError("expected the same prompts and flags in all processes; they differ")
    several = any(prompt.later for prompt in asked)
    streamed = not arguments.json and len(prompts) == arguments.samples == 1 and not several
    tokenizer, stops = model.tokenizer, arguments.stop or []
    shows_prompts = not arguments.answer_only
    printer = _Printer(tokenizer, prompts[0], stops, shows_prompts) if streamed and tokenizer is not None else None
    generate = functools.partial(
        model.generate,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        max_length=arguments.max_length,
        samples=arguments.samples,
        logprobs=arguments.logprobs,
        simulate_accept_length=arguments.simulate_accept_length,
        **{name: getattr(arguments, name) for name in SAMPLING_OPTIONS},
    )
    with contextlib.ExitStack() as files:
        with all_or_none():
            write_round = files.enter_context(tracing(arguments.trace if first else None))
        # With a trace, the rounds of all processes must end at the same time, although only the first one writes.
        on_round = write_round if first or arguments.trace is None else _ignore_round
        result = generate(tree=spec.tree, budget=spec.budget, on_tokens=printer, on_round=on_round)
    comparison = compare(generate, spec) if arguments.compare else None
    result, answers = answer_turns(asked, result, encode, lambda ids, turn: _later(generate, ids, turn, spec))
    if arguments.json:
        extra = {} if comparison is None else {"comparison": dataclasses.asdict(comparison)}
        extra |= {"conversations": answers} if several else {}
        write_output(json_line(dataclasses.asdict(result) | extra))
        return
    texts = [_texts(model, prompt, chat) for prompt in asked] if shows_prompts else []
    printer.finish() if printer else _print_batch(texts, result, answers)
    if first and not arguments.answer_only:
        table = statistics_table(model, result, comparison)
        width = shutil.get_terminal_size().columns
        print(folded(table, width, NAME_WIDTH + 1) if sys.stderr.isatty() else table, file=sys.stderr)


def _later(generate: functools.partial[RunResult], ids: list[list[int]], turn: int, spec: DecodingSpec) -> RunResult:
    """Answer a later turn of conversations, with other random draws."""
    seed = (generate.keywords["seed"] + turn) % 2**32
    again = functools.partial(generate.func, **generate.keywords | {"seed": seed})
    return again(ids, tree=spec.tree, budget=spec.budget)


def _ignore_round(number: int, info: RoundInfo) -> None:
    """Do nothing: of several processes, only the first writes the trace."""


class _Printer:
    """Prints one sequence while it is generated, if asked to the text of its prompt first."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str], shows_prompt: bool):
        self._visible, self._printed_prompt = VisibleText(tokenizer, prompt, stops), not shows_prompt

    def __call__(self, new: list[list[int]]) -> None:
        # The prompt is printed with the first new token, so that a rejected request prints nothing.
        text = self._visible.push(new[0])
        write_output(text if self._printed_prompt else self._visible.prompt + text)
        self._printed_prompt = True

    def finish(self) -> None:
        write_output(self._visible.finish() + "\n")


def _texts(model: Model, prompt: Prompt, chat: dict[str, Any]) -> list[str]:
    """Texts that are printed before the answers of a prompt: its own, or those of its turns."""
    if prompt.later:
        return [f"{text}\n" for text in (prompt.text, *prompt.later)]
    return [chat_text(model, prompt, **chat) or prompt.text]


def _print_batch(texts: list[list[str]], result: RunResult, answers: list[list[int]]) -> None:
    for sequence, own in enumerate(answers):
        number, sample = divmod(sequence, result.samples)
        before = texts[number] if number < len(texts) else [""] * len(own)
        for turn, place in enumerate(own):
            prompt, name = result.prompts[place], f"{number}, turn {turn}" if len(own) > 1 else f"{number}"
            name += f", sample {sample}" if result.samples > 1 else ""
            text = ",".join(map(str, prompt.token_ids)) if prompt.text is None else before[turn] + prompt.text
            write_output(f"--- prompt {name} ({prompt.new_tokens} new tokens, {prompt.finish_reason})\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
