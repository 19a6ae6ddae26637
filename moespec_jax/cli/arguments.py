"""Flags that several command lines share - model, tree, budget - and the values they stand for."""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, current_fields, resolve
from moespec_jax.decoding.budget_rules import ANCHORS, COVERAGES, EXPERT_WEIGHTS, SCORES, SIZES
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.files import parse_numbers
from moespec_jax.nn.quantization import QUANTIZATIONS
from moespec_jax.parallel.mesh import MeshConfig, parse_mesh
from moespec_jax.runtime.load import DEMO_DRAFT, DEMO_TARGET, load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.tuned_profile import read_profile

# Fields of `BudgetConfig` that have a flag `--budget-...`.
_RULE = (
    "coverage", "score", "credit", "anchor", "size", "mass", "anchor_probability", "min_kept_weight", "groups",
)  # fmt: skip


def load_requested(arguments: argparse.Namespace, *budgets: BudgetConfig | None) -> Model:
    """Load the model and draft head of the flags; budgets are checked before weights are read.

    Raises:
        CheckpointError: they cannot be loaded.
        RequestError: the model cannot have a budget.
    """

    def check(config: DecoderConfig) -> None:
        for budget in budgets:
            check_budget(budget, config)

    return load(
        arguments.model,
        arguments.draft_model,
        revision=arguments.revision,
        draft_revision=arguments.draft_revision,
        draft_boundaries=boundaries_of(arguments),
        offline=arguments.offline,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        mesh=mesh_of(arguments),
        progress=sys.stderr.isatty(),
        check=check,
    )


def mesh_of(arguments: argparse.Namespace) -> MeshConfig | Literal["auto"] | None:
    """The mesh of `--mesh`, None without one, or where a command line has no such flag.

    Raises:
        RequestError: it is no mesh.
    """
    try:
        text = getattr(arguments, "mesh", None)
        if text is None or text == "auto":
            return text
        return parse_mesh(text)
    except ValueError as error:
        raise RequestError(str(error)) from None


def requested_spec(arguments: argparse.Namespace) -> DecodingSpec:
    """Tree and budget of `--profile` or of the other flags, without which the tree is "default".

    Raises:
        RequestError: there are no such tree and budget, or both a profile and flags give them.
    """
    tree, budget = tree_of(arguments), budget_of(arguments)
    if arguments.profile is None:
        return DecodingSpec(tree or "default", budget)
    if tree is not None or budget is not None:
        raise RequestError("expected a tree and a budget either from --profile or from flags; got both")
    return DecodingSpec(**read_profile(arguments.profile))


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


def rule_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `BudgetConfig` that flags give."""
    given = {name: getattr(arguments, f"budget_{name}") for name in _RULE}
    return current_fields({name: value for name, value in given.items() if value is not None})


def budget_of(arguments: argparse.Namespace) -> BudgetConfig | None:
    """Budget of the flags, None without one.

    Raises:
        RequestError: there is no such budget.
    """
    if arguments.expert_budget in (None, "none"):
        given = next((name for name in _RULE if getattr(arguments, f"budget_{name}") is not None), None)
        if given is not None:
            flag = f"--budget-{given.replace('_', '-')}"
            raise RequestError(f"{flag} is about a budget; expected --expert-budget with it")
        return None
    try:
        return BudgetConfig(parse_budget(arguments.expert_budget), **rule_of(arguments))
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


def parse_budget(text: str) -> int | float | tuple[int | float, ...]:
    """A count or a fraction of the experts, one for all sparse layers or one for each: `16`, `0.25`, `12,16,16,24`."""
    try:
        numbers = tuple(float(part) if "." in part or "e" in part.lower() else int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"expected --expert-budget as a number of experts (16), a fraction of them (0.25), or one of these for each"
            f" sparse layer between commas; got {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def shown_name(name: str) -> str:
    """What results call a model or a head: a hub id as it is, of a directory its name, for its place means nothing on
    another machine."""
    embedded = {DEMO_TARGET: "the embedded target", DEMO_DRAFT: "the embedded head"}
    return embedded.get(name) or (Path(name).resolve().name if Path(name).exists() else name)


def boundaries_of(arguments: argparse.Namespace) -> tuple[int, ...] | None:
    """The boundaries of `--draft-boundaries`, None without it.

    Raises:
        CheckpointError: they are not integers.
    """
    given = arguments.draft_boundaries
    return None if given is None else parse_numbers(given, "--draft-boundaries")


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """Which model and draft head, and how they are loaded."""
    group.add_argument("--model", default=DEMO_TARGET, help="directory or hub id (default: the embedded pair)")
    group.add_argument(
        "--draft-model",
        help="directory or hub id of an EAGLE-3 head; none: plain decoding (default: the embedded pair's)",
    )
    group.add_argument(
        "--draft-boundaries", metavar="2,24,45", help="which states of the target the head reads, where its files err"
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--draft-revision", help="the same of the draft head")
    group.add_argument("--offline", action="store_true", help="use the local hub cache only")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and activations")
    group.add_argument("--quantization", choices=QUANTIZATIONS, help="keep routed experts in it: half of bf16, lossy")
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept, or none (default: ~/.cache/moespec_jax)",
    )


def add_tree_flags(group: argparse._ArgumentGroup) -> None:
    """The shape of the draft tree."""
    group.add_argument(
        "--tree-depth", type=int, help="how often the beam is expanded; nodes reach depth + 1 (EAGLE: 7)"
    )
    group.add_argument("--tree-top-k", type=int, help="width of the beam; 1 is a chain (EAGLE: 10)")
    group.add_argument("--tree-size", type=int, help="tokens verified at once, the root included (EAGLE: 60)")


def add_profile_flag(group: argparse._ArgumentGroup) -> None:
    """Tree and budget from a file."""
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="tree and budget that python -m moespec_jax.tune found best, instead of flags for them",
    )


def add_budget_flags(group: argparse._ArgumentGroup) -> None:
    """How many experts a verification may read, and by which rule."""
    group.add_argument(
        "--expert-budget",
        metavar="B",
        help="most experts a layer reads in a verification: a number, a fraction of all, or one for each sparse layer"
        " between commas (default: none, which is exact)",
    )
    add_rule_flags(group)


def add_rule_flags(group: argparse._ArgumentGroup) -> None:
    """Rule of a budget, without the number of experts. Second names are from before 0.2."""
    rule = BudgetConfig
    group.add_argument(
        "--budget-coverage",
        "--budget-policy",
        choices=[*COVERAGES, "guarantee"],
        help=f"where rows go whose experts are not read ({rule.coverage}); guarantee: substitute with anchor likely",
    )
    group.add_argument(
        "--budget-score", choices=list(SCORES), help=f"weight of each row in the experts' scores ({rule.score})"
    )
    group.add_argument(
        "--budget-credit", choices=list(EXPERT_WEIGHTS), help=f"what a row adds to an expert's score ({rule.credit})"
    )
    group.add_argument(
        "--budget-anchor", choices=list(ANCHORS), help=f"rows whose own experts come first ({rule.anchor})"
    )
    group.add_argument("--budget-size", choices=list(SIZES), help=f"how many of the B are read ({rule.size})")
    group.add_argument(
        "--budget-mass", type=float, metavar="P", help=f"share of the scores that size mass keeps ({rule.mass})"
    )
    group.add_argument(
        "--budget-anchor-probability",
        "--budget-guarantee",
        type=float,
        metavar="P",
        help=f"path probability from which anchor likely includes a row ({rule.anchor_probability})",
    )
    group.add_argument(
        "--budget-min-kept-weight",
        "--budget-faithfulness",
        type=float,
        metavar="F",
        help="prune drafted tokens of which a layer keeps less than this share of their own experts' weight; 1 is"
        f" exact ({rule.min_kept_weight:g})",
    )
    group.add_argument(
        "--budget-groups",
        type=int,
        metavar="N",
        help="divide the budget evenly among so many groups of consecutive experts; with as many as --mesh expert=, no"
        f" device reads more than its share (balanced); {rule.groups} ranks all experts together (global, default)",
    )
