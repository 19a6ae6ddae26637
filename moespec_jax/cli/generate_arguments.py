"""Flags of `python -m moespec_jax.generate`, and checks of their combinations."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from moespec_jax.cli.arguments import (
    add_mesh_flag,
    add_model_flags,
    add_profile_flag,
    add_speculate_flag,
    add_tree_flags,
)
from moespec_jax.cli.budget_flags import add_budget_flags
from moespec_jax.cli.command import command_parser
from moespec_jax.cli.process_flags import add_process_flags
from moespec_jax.cli.prompts import TOOLS_WITHOUT_CONVERSATION, Prompt
from moespec_jax.cli.sampling_flags import add_sampling_flags
from moespec_jax.errors import RequestError
from moespec_jax.runtime.drafters import DEFAULT_TREE, NGRAM_TREE
from moespec_jax.runtime.load import DEMO_TARGET

# Flags that have no meaning in plain decoding.
_DRAFTING = (
    "draft_boundaries", "draft_revision", "speculate", "tree_depth", "tree_top_k", "tree_size",
    "simulate_accept_length", "trace", "compare", "expert_budget", "profile", "max_kl",
)  # fmt: skip


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Make the parser of `python -m moespec_jax.generate`."""
    parser = command_parser("generate", description)
    add_model_flags(parser.add_argument_group("model"))
    _add_prompt_flags(parser.add_argument_group("prompts (several form a batch; default: a built-in one)"))
    add_sampling_flags(parser, max_new_tokens=128)
    _add_drafting_flags(
        parser.add_argument_group(
            "speculative decoding",
            "Needs --draft-model with any target but the embedded one. The default tree\n"
            f"(size/depth/top-k) is {DEFAULT_TREE.name}, with ngram {NGRAM_TREE.name}, of a DFlash or DSpark head the\n"
            "chain of its block. Where some of the three tree flags are given, the others\nhave EAGLE's values.",
        )
    )
    add_budget_flags(
        parser.add_argument_group("expert budget of the verification (in general lossy; see docs/budgets.md)")
    )
    _add_output_flags(parser.add_argument_group("output"))
    _add_device_flags(parser.add_argument_group("several devices"))
    return parser


def check_flags(arguments: argparse.Namespace) -> None:
    """Check combinations of flags, before anything is loaded.

    Raises:
        RequestError: a flag has no meaning without another one.
    """
    if not arguments.chat and (arguments.system is not None or arguments.no_thinking):
        raise RequestError("--system and --no-thinking are parts of a chat; expected --chat with them")
    if arguments.tools is not None and not (arguments.chat or arguments.prompt_file):
        raise RequestError(TOOLS_WITHOUT_CONVERSATION)
    if arguments.answer_only and (arguments.json or arguments.compare):
        raise RequestError("--answer-only prints text alone; expected neither --json nor --compare with it")
    if arguments.logprobs is not None and not arguments.json:
        raise RequestError("--logprobs are part of the JSON output; expected --json with it")
    if arguments.draft_model == "none" or (arguments.draft_model is None and arguments.model != DEMO_TARGET):
        for flag in _DRAFTING:
            if getattr(arguments, flag) not in (None, False, "none"):
                raise RequestError(
                    f"--{flag.replace('_', '-')} needs a draft head or a drafter; expected --draft-model with it"
                )


def check_turns(arguments: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Check that no flag needs a single batch where later turns make further ones.

    Raises:
        RequestError: it does.
    """
    conversation = next((prompt.conversation for prompt in prompts if prompt.later), None)
    if conversation is not None and (arguments.trace is not None or arguments.compare or arguments.samples != 1):
        raise RequestError(
            f"--trace, --compare and --samples are of one batch; expected prompts of one turn with them, got several"
            f" turns in {conversation.where}"
        )


def check_processes(arguments: argparse.Namespace) -> None:
    """Check that several processes can run this command together, before anything is loaded.

    Raises:
        RequestError: there is no mesh to share, or a prompt that only one of them can read.
    """
    if jax.process_count() == 1:
        return
    if arguments.mesh is None:
        raise RequestError("expected --mesh with several processes: without it each would do the same work alone")
    if "-" in (arguments.prompt or []):
        raise RequestError("expected a --prompt that all processes have; standard input belongs to one of them")


def _add_prompt_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; - reads standard input; repeatable"
    )
    group.add_argument(
        "--prompt-text", action="append", metavar="FILE", help="the whole text of a file as one prompt; repeatable"
    )
    group.add_argument(
        "--prompt-file",
        action="append",
        metavar="FILE",
        help="one prompt in each line, or JSON lines with turns, texts of the user that are answered one after another,"
        " or with messages, a conversation that is answered; several turns and messages are rendered by the chat"
        " template; repeatable",
    )
    group.add_argument("--prompt-ids", action="append", metavar="5,17,9", help="token ids instead of text; repeatable")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to text prompts")
    group.add_argument("--system", metavar="TEXT", help="system message of the chat")
    group.add_argument(
        "--tools", type=Path, metavar="FILE", help="JSON list of definitions of tools, which the chat template renders"
    )
    group.add_argument(
        "--no-thinking", action="store_true", help="render the chat template with enable_thinking set to false"
    )


def _add_drafting_flags(group: argparse._ArgumentGroup) -> None:
    add_speculate_flag(group)
    add_tree_flags(group)
    add_profile_flag(group)
    group.add_argument(
        "--simulate-accept-length",
        type=float,
        metavar="X",
        help="accept X tokens a round on average, independently of the model: for timing only, the text is meaningless",
    )
    group.add_argument(
        "--compare", action="store_true", help="also time plain decoding on the same prompts, and print the speed-up"
    )


def _add_device_flags(group: argparse._ArgumentGroup) -> None:
    add_mesh_flag(group)
    add_process_flags(group)


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="print one JSON object to stdout, and nothing else")
    group.add_argument(
        "--answer-only", action="store_true", help="print the new text alone, without prompts and table of statistics"
    )
    group.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="continuations of each prompt, which is read once: those of a batch that has it N times (default: 1)",
    )
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="with --json: the log-probability of every new token under the target's raw logits, before temperature and"
        " penalties, and the K most probable tokens at its place",
    )
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="write JSON lines, one for each round and sequence: tree and its shape, what was accepted, experts; with"
        " --speculate auto also the seconds and tokens that the costs predicted",
    )
