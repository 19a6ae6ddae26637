"""Generate training data with the target: python -m moespec_jax.train.regenerate --data IN.jsonl --output OUT.jsonl.

A head learns to predict the output of its target, and so learns best from that output (EAGLE-3, arXiv:2503.01840,
section 4). Of a chat, the assistant's last turn is generated again. Of a text or token ids, the first tokens are
continued. The same command continues an interrupted run: responses in OUT.jsonl are kept.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from moespec_jax.checkpoint.chat import render
from moespec_jax.checkpoint.conversation import Conversation
from moespec_jax.cli.arguments import DTYPES
from moespec_jax.cli.command import Parser, run_command
from moespec_jax.errors import RequestError, UnusableConversation
from moespec_jax.files import writing
from moespec_jax.runtime.load import DEMO_TARGET, load
from moespec_jax.runtime.model import Model
from moespec_jax.train.left_out import LeftOut
from moespec_jax.train.records import LeaveOut, read_records, record_conversation, record_text, stop


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    model = load(arguments.model, "none", dtype=arguments.dtype, progress=sys.stderr.isatty())
    left_out = LeftOut(arguments.output.with_name(f"{arguments.output.name}.left_out.txt"), arguments.stop_at_refused)
    thinking = not arguments.no_thinking
    read = read_prompts(model, arguments.data, arguments.prompt_tokens, thinking, leave_out=left_out)
    prompts = list(left_out.report(read))
    regenerate(
        model, prompts, arguments.output,
        batch=arguments.batch, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
        seed=arguments.seed,
    )  # fmt: skip


def read_prompts(
    model: Model, path: Path, prompt_tokens: int, thinking: bool = True, *, leave_out: LeaveOut = stop
) -> Iterator[list[int]]:
    """Read the prompt of every line of `path` as token ids.

    Args:
        model: tokenizer, chat template and limits.
        path: JSON lines.
        prompt_tokens: number of first tokens of a text, or of `prompt_ids`, that are the prompt.
        thinking: let chats think, if their template has a setting for it.
        leave_out: called with the error of each conversation that the chat template refuses.

    Raises:
        RequestError: a line holds no prompt, or one that is empty, too long or outside the vocabulary.
        UnusableConversation: a conversation is left out, by default.
    """
    for number, record in read_records(path):
        where = f"line {number} of {path}"
        if isinstance(record.get("prompt_ids"), list):
            ids = record["prompt_ids"][:prompt_tokens]
        elif (text := record_text(record, where)) is not None:
            ids = model.encode(text)[:prompt_tokens]
        else:
            conversation = _unanswered(record_conversation(record, where))
            try:
                prompt = render(model.directory, conversation, ask=True, thinking=thinking).text
            except UnusableConversation as error:
                leave_out(error)
                continue
            ids = model.encode(prompt, special_tokens=False)
        _check_prompt(model, ids, where)
        yield ids


def _unanswered(conversation: Conversation) -> Conversation:
    """Remove the assistant's turns at the end."""
    turns = list(conversation.turns)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise RequestError(f"expected a turn before the assistant's in {conversation.where}")
    return dataclasses.replace(conversation, turns=turns)


def _check_prompt(model: Model, ids: Sequence[object], where: str) -> None:
    """Check a prompt before generation begins, which takes hours."""
    vocab, context = model.config.vocab_size, model.config.context_length
    if not all(type(i) is int and 0 <= i < vocab for i in ids):
        raise RequestError(f"expected token ids from 0 to {vocab - 1} in {where}")
    if not 0 < len(ids) < context:
        raise RequestError(f"expected a prompt of 1 to {context - 1} tokens in {where}; it has {len(ids)}")


def regenerate(
    model: Model,
    prompts: list[list[int]],
    output: Path,
    *,
    batch: int,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
) -> None:
    """Append the record of every prompt that `output` does not contain yet, in order.

    Raises:
        RequestError: `output` cannot be written, or contains other lines than responses to the first of these prompts;
            or a number is out of range.
    """
    if batch < 1:
        raise RequestError(f"expected a batch of at least 1; got {batch}")
    try:
        done = _resume(output, prompts, batch)
    except OSError as error:
        raise RequestError(f"expected to write to {output}; {error.strerror}") from None
    with (
        writing(output),
        output.open("a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=done, unit="prompt") as bar,
    ):
        for start in range(done, len(prompts), batch):
            part = prompts[start : start + batch]
            # The last batch is filled up: another batch size would be compiled separately.
            filled = part + part[-1:] * (batch - len(part))
            result = model.generate(
                filled,
                max_new_tokens=max_new_tokens,
                seed=(seed + start) % 2**32,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                repetition_penalty=1.0,
            )
            for prompt, response in zip(part, result.prompts, strict=False):
                file.write(json.dumps({"prompt_ids": prompt, "response_ids": response.token_ids}) + "\n")
            file.flush()
            bar.update(len(part))


def _resume(output: Path, prompts: list[list[int]], batch: int) -> int:
    """Truncate `output` to the records of whole batches, and return their number: the seed of a batch depends on the
    prompt at which it begins."""
    output.touch()
    lines = output.read_bytes().split(b"\n")[:-1]  # without an incomplete last line
    try:
        kept = [json.loads(line)["prompt_ids"] for line in lines]
    except (ValueError, TypeError, KeyError):
        kept = [None]
    if kept[: len(prompts)] != prompts[: len(kept)]:
        raise RequestError(
            f"expected {output} to hold responses to the same prompts; it holds others: use another file"
        )
    done = len(lines) if len(lines) >= len(prompts) else len(lines) // batch * batch
    temporary = output.with_name(output.name + ".incomplete")
    temporary.write_bytes(b"".join(line + b"\n" for line in lines[:done]))
    temporary.replace(output)
    return done


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m moespec_jax.train.regenerate", description=__doc__)
    parser.add_argument(
        "--model", default=DEMO_TARGET, help="target: directory or hub id (default: the embedded target)"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="texts, chats or token ids (JSON lines)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="responses (JSON lines); an existing file is continued",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=64,
        metavar="N",
        help="number of first tokens of a text that are the prompt (default: %(default)s)",
    )
    parser.add_argument("--no-thinking", action="store_true", help="answer chats without thinking")
    parser.add_argument(
        "--stop-at-refused",
        action="store_true",
        help="stop at a chat that the target's template refuses; by default such chats are left out, counted and named",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest response in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="sampling temperature; 0 is greedy (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="prompts decoded at once (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of weights and activations (default: float32 on CPU, bfloat16 elsewhere)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
