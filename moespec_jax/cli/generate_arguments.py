"""The flags of `generate`, and which of them say nothing together."""

import argparse

import jax

from moespec_jax.cli.arguments import add_budget_flags, add_model_flags, add_tree_flags
from moespec_jax.cli.command import Parser
from moespec_jax.cli.process_flags import add_process_flags
from moespec_jax.errors import RequestError
from moespec_jax.runtime.load import DEMO_TARGET

# Flags that say nothing where nothing is drafted.
_DRAFTING = (
    "draft_boundaries", "draft_revision", "tree_depth", "tree_top_k", "tree_size", "simulate_accept_length", "trace",
    "compare", "expert_budget", "profile",
)  # fmt: skip


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m moespec_jax.generate`."""
    parser = Parser(prog="python -m moespec_jax.generate", description=description, allow_abbrev=False)
    add_model_flags(parser.add_argument_group("model"))
    _add_prompt_flags(parser.add_argument_group("prompts (several form a batch)"))
    _add_sampling_flags(parser.add_argument_group("sampling"))
    _add_drafting_flags(parser.add_argument_group("speculative decoding"))
    add_budget_flags(parser.add_argument_group("expert budget of the verification (lossy)"))
    _add_output_flags(parser.add_argument_group("output"))
    _add_device_flags(parser.add_argument_group("several devices"))
    return parser


def refuse_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that say nothing together, before anything is loaded.

    Raises:
        RequestError: there are such flags.
    """
    if not arguments.chat and (arguments.system is not None or arguments.no_thinking):
        raise RequestError("--system and --no-thinking are parts of a chat; expected --chat with them")
    if arguments.draft_model == "none" or (arguments.draft_model is None and arguments.model != DEMO_TARGET):
        for flag in _DRAFTING:
            if getattr(arguments, flag) not in (None, False, "none"):
                raise RequestError(f"--{flag.replace('_', '-')} is about a draft head; expected --draft-model with it")


def refuse_processes(arguments: argparse.Namespace) -> None:
    """Refuse what several processes cannot do together, before anything is loaded.

    Raises:
        RequestError: there is no mesh to share, or a prompt that only one of them can read.
    """
    if jax.process_count() == 1:
        return
    if arguments.mesh is None:
        raise RequestError("expected --mesh with several processes: without it each would do the same alone")
    if "-" in (arguments.prompt or []):
        raise RequestError("expected a --prompt that all processes have; standard input is one's own")


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
    group.add_argument("--max-length", type=int, help="longest sequence in tokens (default: the model's context)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's stop ids")


def _add_drafting_flags(group: argparse._ArgumentGroup) -> None:
    add_tree_flags(group)
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="tree and budget that `python -m moespec_jax.tune` found best, instead of flags",
    )
    group.add_argument(
        "--simulate-accept-length",
        type=float,
        metavar="X",
        help="accept X tokens a round on average, whatever the model says: for timing only",
    )
    group.add_argument("--compare", action="store_true", help="decode plainly as well, and tell the speed-up")


def _add_device_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mesh",
        metavar="data=1,expert=4,tensor=2",
        help="spread sequences (data), each layer's experts (expert) and each expert's width (tensor) over devices;"
        " attention and output head over expert and tensor together; auto: over all there are (default: one device)",
    )
    add_process_flags(group)


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    group.add_argument("--trace", metavar="FILE", help="JSON lines, one a round and sequence")
