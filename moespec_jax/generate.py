"""Generate text: `python -m moespec_jax.generate`. Without arguments, the embedded model on a built-in prompt."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from tokenizers import Tokenizer

from moespec_jax.command import Parser, run_command, write_output
from moespec_jax.model import DEMO_TARGET, Model, RequestError, load
from moespec_jax.prompts import gather_texts, parse_prompt_ids
from moespec_jax.results import RunResult
from moespec_jax.text import TextStream, chat_prompt

# Flags of the command-line contract whose features are not built yet: accepted by name, refused in words.
_LATER = {
    "speculative decoding": (
        "tree-depth",
        "tree-top-k",
        "tree-size",
        "simulate-accept-length",
        "trace",
        "draft-revision",
    ),
    "expert budgets": ("expert-budget", "budget-policy", "budget-score", "budget-size", "budget-anchor"),
    "several devices": ("mesh",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for what the caller can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    _refuse_flags(arguments)
    texts, ids = gather_texts(arguments, sys.stdin), [parse_prompt_ids(p) for p in arguments.prompt_ids or []]
    model = load(
        arguments.model,
        revision=arguments.revision,
        offline=arguments.offline,
        dtype=arguments.dtype,
        progress=sys.stderr.isatty(),
    )
    if arguments.chat:
        texts = [chat_prompt(model.directory, t, arguments.system, not arguments.no_thinking) for t in texts]
    # A chat template writes the special tokens itself.
    prompts = [model.encode(text, special_tokens=not arguments.chat) for text in texts] + ids
    alone = not arguments.json and len(prompts) == 1
    streams = _Printer(model.tokenizer, prompts[0]) if alone and model.tokenizer is not None else None
    result = model.generate(
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
        max_length=arguments.max_length,
        on_tokens=streams,
    )
    if arguments.json:
        write_output(json.dumps(dataclasses.asdict(result)) + "\n")
        return
    streams.finish() if streams else _print_batch(texts, result)
    print(_statistics(model, result), file=sys.stderr)


class _Printer:
    """Prints one sequence as it arrives: the prompt's text first, so that the continuation reads on."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self._stream = TextStream(tokenizer)
        self._prompt = prompt

    def __call__(self, new: list[list[int]]) -> None:
        # The prompt comes with the first token: nothing is printed of a request that is refused.
        write_output(self._stream.push([*self._prompt, *new[0]]))
        self._prompt = []

    def finish(self) -> None:
        write_output(self._stream.flush() + "\n")


def _print_batch(texts: list[str], result: RunResult) -> None:
    for number, prompt in enumerate(result.prompts):
        given = texts[number] if number < len(texts) else ""
        text = ",".join(map(str, prompt.token_ids)) if prompt.text is None else given + prompt.text
        write_output(f"--- prompt {number} ({prompt.new_tokens} new tokens, {prompt.finish_reason})\n{text}\n")


def _statistics(model: Model, result: RunResult) -> str:
    new = sum(p.new_tokens for p in result.prompts)
    ends = ", ".join(sorted({p.finish_reason for p in result.prompts}))
    rows = [
        ("model", f"{model.config.model_type} from {model.directory}"),
        ("device", f"{result.device}, {result.dtype}"),
        ("output", f"exact, plain decoding; {new} new tokens, ended by {ends}"),
        ("compilation", f"{result.compile_s:.2f} s"),
        ("prefill", f"{result.prefill_s * 1e3:.1f} ms for {sum(p.prompt_tokens for p in result.prompts)} tokens"),
        ("decoding", f"{result.tokens_per_s:.1f} tokens/s"),
        ("experts", f"{result.experts_loaded:.1f} of {model.config.num_experts} read per layer and step"),
    ]
    return "\n" + "\n".join(f"{name:12} {value}" for name, value in rows)


def _refuse_flags(arguments: argparse.Namespace) -> None:
    if not arguments.chat and (arguments.system is not None or arguments.no_thinking):
        raise RequestError("--system and --no-thinking are parts of a chat; expected --chat with them")
    if arguments.draft_model not in (None, "none"):
        raise RequestError("expected --draft-model none: speculative decoding is not part of this version yet")
    for feature, flags in _LATER.items():
        for flag in flags:
            if getattr(arguments, flag.replace("-", "_")) not in (None, "none"):
                raise RequestError(f"--{flag} belongs to {feature}, which is not part of this version yet")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m moespec_jax.generate", description=__doc__, allow_abbrev=False)
    _add_model_flags(parser.add_argument_group("model"))
    _add_prompt_flags(parser.add_argument_group("prompts (several form a batch)"))
    _add_sampling_flags(parser.add_argument_group("sampling"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    later = parser.add_argument_group("not part of this version yet")
    for flags in _LATER.values():
        for flag in flags:
            later.add_argument(f"--{flag}", help=argparse.SUPPRESS)
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default=DEMO_TARGET, help="directory or hub id (default: the embedded model)")
    group.add_argument("--draft-model", metavar="none", help="none: plain decoding, all there is in this version")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--offline", action="store_true", help="use the local hub cache only")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and activations")
    group.add_argument("--max-length", type=int, help="longest sequence in tokens (default: the model's context)")
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept, or none (default: ~/.cache/moespec_jax)",
    )


def _add_prompt_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", action="append", help="text to continue; - reads standard input; repeatable")
    group.add_argument("--prompt-file", action="append", help="one prompt a line, or JSON lines with turns; repeatable")
    group.add_argument("--prompt-ids", action="append", metavar="5,17,9", help="token ids instead of text; repeatable")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template")
    group.add_argument("--system", help="system turn of the chat")
    group.add_argument(
        "--no-thinking", action="store_true", help="ask the chat template for an answer without thinking"
    )


def _add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=int, default=128)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's stop ids")


if __name__ == "__main__":
    sys.exit(main())
