"""The flags of `generate`, and what they ask for."""

import argparse

from moespec_jax.budget import ANCHORS, COVERAGES, CREDITS, SCORES, SIZES
from moespec_jax.budget_config import BudgetConfig, resolve
from moespec_jax.command import Parser
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.files import parse_numbers
from moespec_jax.model import DEMO_TARGET, RequestError

# Flags of the command-line contract whose features are not built yet: accepted by name, refused in words.
_LATER = {"several devices": ("mesh",)}
# Flags that say nothing where nothing is drafted.
_DRAFTING = (
    "draft_boundaries", "draft_revision", "tree_depth", "tree_top_k", "tree_size", "simulate_accept_length", "trace",
    "compare", "expert_budget",
)  # fmt: skip
# Flags of a budget's rule, and the setting each is about.
_RULE = {
    "budget_policy": "coverage", "budget_score": "score", "budget_credit": "credit", "budget_anchor": "anchor",
    "budget_size": "size", "budget_mass": "mass", "budget_guarantee": "guarantee",
    "budget_faithfulness": "faithfulness",
}  # fmt: skip


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m moespec_jax.generate`."""
    parser = Parser(prog="python -m moespec_jax.generate", description=description, allow_abbrev=False)
    _add_model_flags(parser.add_argument_group("model"))
    _add_prompt_flags(parser.add_argument_group("prompts (several form a batch)"))
    _add_sampling_flags(parser.add_argument_group("sampling"))
    _add_tree_flags(parser.add_argument_group("speculative decoding"))
    _add_budget_flags(parser.add_argument_group("expert budget of the verification (lossy)"))
    _add_output_flags(parser.add_argument_group("output"))
    later = parser.add_argument_group("not part of this version yet")
    for flags in _LATER.values():
        for flag in flags:
            later.add_argument(f"--{flag}", help=argparse.SUPPRESS)
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
    for feature, flags in _LATER.items():
        for flag in flags:
            if getattr(arguments, flag.replace("-", "_")) not in (None, "none"):
                raise RequestError(f"--{flag} belongs to {feature}, which is not part of this version yet")


def tree_of(arguments: argparse.Namespace) -> TreeConfig | None:
    """The tree that the flags ask for, None if they leave it to the platform. What they leave out of a tree is EAGLE's,
    or as much of it as the rest allows.

    Raises:
        RequestError: there is no such tree.
    """
    depth, top_k, size = arguments.tree_depth, arguments.tree_top_k, arguments.tree_size
    if depth is None and top_k is None and size is None:
        return None
    try:
        depth = TreeConfig.depth if depth is None else depth
        top_k = TreeConfig.top_k if top_k is None else top_k
        if size is None:
            size = min(TreeConfig.size, TreeConfig(depth, top_k, 2).pool + 1)
        return TreeConfig(depth, top_k, size)
    except ValueError as error:
        raise RequestError(str(error)) from None


def budget_of(arguments: argparse.Namespace) -> BudgetConfig | None:
    """The budget that the flags ask for, None without one.

    Raises:
        RequestError: there is no such budget.
    """
    given = {name: getattr(arguments, flag) for flag, name in _RULE.items() if getattr(arguments, flag) is not None}
    if arguments.expert_budget in (None, "none"):
        if given:
            flag = next(flag for flag, name in _RULE.items() if name in given)
            raise RequestError(f"--{flag.replace('_', '-')} is about a budget; expected --expert-budget with it")
        return None
    try:
        return BudgetConfig(_parse_budget(arguments.expert_budget), **given)
    except ValueError as error:
        raise RequestError(str(error)) from None


def check_budget(budget: BudgetConfig | None, config: DecoderConfig) -> None:
    """Refuse a budget that a model cannot have.

    Raises:
        RequestError: there is no such budget.
    """
    try:
        if budget is not None:
            resolve(budget, config)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _parse_budget(text: str) -> int | float | tuple[int | float, ...]:
    """A count or a fraction of the experts, one for all sparse layers or one for each: `16`, `0.25`, `12,16,16,24`."""
    try:
        numbers = tuple(float(part) if "." in part or "e" in part.lower() else int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"expected --expert-budget as a number of experts (16), a fraction of them (0.25), or one of these for each"
            f" sparse layer between commas; got {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def boundaries_of(arguments: argparse.Namespace) -> tuple[int, ...] | None:
    """The boundaries of `--draft-boundaries`, None without it.

    Raises:
        CheckpointError: they are not integers.
    """
    given = arguments.draft_boundaries
    return None if given is None else parse_numbers(given, "--draft-boundaries")


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default=DEMO_TARGET, help="directory or hub id (default: the embedded pair)")
    group.add_argument(
        "--draft-model",
        help="directory or hub id of an EAGLE-3 head; none: plain decoding (default: the embedded pair's)",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--draft-revision", help="the same of the draft head")
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


def _add_tree_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tree-depth", type=int, help="how often the beam is expanded; nodes reach depth + 1 (EAGLE: 7)"
    )
    group.add_argument("--tree-top-k", type=int, help="width of the beam; 1 is a chain (EAGLE: 10)")
    group.add_argument("--tree-size", type=int, help="tokens verified at once, the root included (EAGLE: 60)")
    group.add_argument(
        "--draft-boundaries", metavar="2,24,45", help="which states of the target the head reads, where its files err"
    )
    group.add_argument(
        "--simulate-accept-length",
        type=float,
        metavar="X",
        help="accept X tokens a round on average, whatever the model says: for timing only",
    )
    group.add_argument("--compare", action="store_true", help="decode plainly as well, and tell the speed-up")


def _add_budget_flags(group: argparse._ArgumentGroup) -> None:
    rule = BudgetConfig
    group.add_argument(
        "--expert-budget",
        metavar="B",
        help="most experts a layer reads in a verification: a number, a fraction of all, or one for each sparse layer"
        " between commas (default: none, which is exact)",
    )
    group.add_argument(
        "--budget-policy",
        choices=list(COVERAGES),
        help=f"what becomes of tokens whose experts are not read (default: {rule.coverage})",
    )
    group.add_argument(
        "--budget-score", choices=list(SCORES), help=f"how much each drafted token counts (default: {rule.score})"
    )
    group.add_argument(
        "--budget-credit", choices=list(CREDITS), help=f"what a token says of each expert (default: {rule.credit})"
    )
    group.add_argument(
        "--budget-anchor", choices=list(ANCHORS), help=f"whose experts are always read (default: {rule.anchor})"
    )
    group.add_argument("--budget-size", choices=list(SIZES), help=f"how many of the B are read (default: {rule.size})")
    group.add_argument(
        "--budget-mass", type=float, metavar="P", help=f"share of the scores that size mass keeps ({rule.mass})"
    )
    group.add_argument(
        "--budget-guarantee",
        type=float,
        metavar="P",
        help=f"chance of being accepted from which policy guarantee keeps a token's experts ({rule.guarantee})",
    )
    group.add_argument(
        "--budget-faithfulness",
        type=float,
        metavar="F",
        help="give up drafted tokens of which a layer keeps less than this share of their own experts' weight; 1 is"
        f" exact ({rule.faithfulness:g})",
    )


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    group.add_argument("--trace", metavar="FILE", help="JSON lines, one a round and sequence")
