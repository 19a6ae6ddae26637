"""Flags shared by several commands (model, tree, budget, profile) and their values."""

import argparse
import sys
from typing import Any, Literal

from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, current_fields, resolve
from moespec_jax.decoding.budget_rules import ANCHORS, COVERAGES, EXPERT_WEIGHTS, SCORES, SIZES
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded, parse_numbers
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
        CheckpointError: model or head cannot be loaded.
        RequestError: a budget does not fit the model.
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
    """Parse `--mesh`; None without it, and for commands that have no such flag.

    Raises:
        RequestError: it is not a mesh.
    """
    try:
        text = getattr(arguments, "mesh", None)
        if text is None or text == "auto":
            return text
        return parse_mesh(text)
    except ValueError as error:
        raise RequestError(str(error)) from None


def requested_spec(arguments: argparse.Namespace) -> DecodingSpec:
    """Read tree and budget from `--profile` or from their flags; without flags, the tree is "default".

    Raises:
        RequestError: tree or budget is invalid, or there are both a profile and flags.
    """
    tree, budget = tree_of(arguments), budget_of(arguments)
    if arguments.profile is None:
        return DecodingSpec(tree or "default", budget)
    if tree is not None or budget is not None:
        raise RequestError("expected a tree and a budget either from --profile or from flags; got both")
    return DecodingSpec(**read_profile(arguments.profile))


def tree_of(arguments: argparse.Namespace) -> TreeConfig | None:
    """Read the tree of the flags; None without any.

    Missing values are EAGLE's; a missing size is at most that of the pool and the root.

    Raises:
        RequestError: the tree is invalid.
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
    """Fields of `BudgetConfig` whose `--budget-...` flags are present."""
    values = {name: getattr(arguments, f"budget_{name}") for name in _RULE}
    return current_fields({name: value for name, value in values.items() if value is not None})


def budget_of(arguments: argparse.Namespace) -> BudgetConfig | None:
    """Read the budget of the flags; None without one.

    Raises:
        RequestError: the budget is invalid, or there are flags of its rule without `--expert-budget`.
    """
    if arguments.expert_budget in (None, "none"):
        present = next((name for name in _RULE if getattr(arguments, f"budget_{name}") is not None), None)
        if present is not None:
            flag = f"--budget-{present.replace('_', '-')}"
            raise RequestError(f"{flag} is part of a budget; expected --expert-budget with it")
        return None
    try:
        return BudgetConfig(parse_budget(arguments.expert_budget), **rule_of(arguments))
    except ValueError as error:
        raise RequestError(str(error)) from None


def check_budget(budget: BudgetConfig | None, config: DecoderConfig) -> None:
    """Check that a budget fits a model.

    Raises:
        RequestError: it does not.
    """
    try:
        if budget is not None:
            resolve(budget, config)
    except ValueError as error:
        raise RequestError(str(error)) from None


def parse_budget(text: str) -> int | float | tuple[int | float, ...]:
    """Parse numbers or fractions of experts, one for all sparse layers or one for each: `16`, `0.25`, `12,16,16,24`."""
    try:
        numbers = tuple(float(part) if "." in part or "e" in part.lower() else int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"expected --expert-budget as a number of experts (16), a fraction of them (0.25), or one of these for each"
            f" sparse layer between commas; got {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def shown_name(name: str) -> str:
    """Name of a model or head in results: `the embedded target`, `the embedded head`, or its `short_name`."""
    embedded = {DEMO_TARGET: "the embedded target", DEMO_DRAFT: "the embedded head"}
    return embedded.get(name) or short_name(name)


def short_name(name: str) -> str:
    """A hub id unchanged; for a path its last part, since the rest differs between machines."""
    path = expanded(name)
    return path.resolve().name if path.exists() else name


def boundaries_of(arguments: argparse.Namespace) -> tuple[int, ...] | None:
    """Parse `--draft-boundaries`; None without it.

    Raises:
        CheckpointError: they are not integers.
    """
    text = arguments.draft_boundaries
    return None if text is None else parse_numbers(text, "--draft-boundaries")


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that select and load model and draft head."""
    group.add_argument(
        "--model", default=DEMO_TARGET, help="target: a directory or a Hugging Face Hub id (default: the embedded one)"
    )
    group.add_argument(
        "--draft-model",
        metavar="HEAD",
        help="EAGLE-3 draft head: a directory or a hub id; none: plain decoding (default: the embedded one with the"
        " embedded target, none with any other)",
    )
    group.add_argument(
        "--draft-boundaries",
        metavar="2,24,45",
        help="boundaries at which the head reads hidden states of the target (b is the input of layer b), in place of"
        " those that the head's files name",
    )
    group.add_argument("--revision", help="branch, tag or commit of the hub repository of --model")
    group.add_argument("--draft-revision", help="branch, tag or commit of the hub repository of --draft-model")
    group.add_argument("--offline", action="store_true", help="load hub repositories from the local cache only")
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of weights and activations (default: float32 on CPU, bfloat16 elsewhere)",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="quantize the routed experts: half the bytes of bfloat16, slightly different output",
    )
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="directory that keeps compiled programs, or none (default: JAX_COMPILATION_CACHE_DIR if set, else"
        " ~/.cache/moespec_jax/xla)",
    )


def add_tree_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the draft tree's shape."""
    group.add_argument(
        "--tree-depth",
        type=int,
        metavar="N",
        help="how often the beam is expanded after the first level, so that paths have up to N + 1 drafted tokens"
        " (EAGLE: 7)",
    )
    group.add_argument(
        "--tree-top-k",
        type=int,
        metavar="N",
        help="width of the beam, and children of a node; 1 is a chain (EAGLE: 10)",
    )
    group.add_argument(
        "--tree-size", type=int, metavar="N", help="tokens verified in one pass, the root included (EAGLE: 60)"
    )


def add_profile_flag(group: argparse._ArgumentGroup) -> None:
    """Add the flag that reads tree and budget from a file."""
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="profile written by python -m moespec_jax.tune: its tree and budget, in place of the flags for them",
    )


def add_budget_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a budget: the number of experts, and the rule that chooses them."""
    group.add_argument(
        "--expert-budget",
        metavar="B",
        help="largest number of experts that a layer reads in a verification: a number (16), a fraction of all experts"
        " (0.25), or one of these for each sparse layer between commas (default: none, which is exact)",
    )
    add_rule_flags(group)


def add_rule_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a budget's rule. The second of two names is an older one."""
    rule = BudgetConfig
    group.add_argument(
        "--budget-coverage",
        "--budget-policy",
        choices=[*COVERAGES, "guarantee"],
        help="routing of a token whose experts are not read: to its best experts among those read (substitute), or to"
        " none in their place (truncate); guarantee: substitute with --budget-anchor likely (default:"
        f" {rule.coverage})",
    )
    group.add_argument(
        "--budget-score",
        choices=list(SCORES),
        help="weight of a token in the experts' scores: 1 (probability), its path probability (path), or the acceptance"
        f" rate of its depth (depth) (default: {rule.score})",
    )
    group.add_argument(
        "--budget-credit",
        choices=list(EXPERT_WEIGHTS),
        help="what a token adds to the score of each expert: its router probability (all), the same of its own experts"
        f" only (hits), or its squared combine weight (squares) (default: {rule.credit})",
    )
    group.add_argument(
        "--budget-anchor",
        choices=list(ANCHORS),
        help="tokens whose own experts precede all others: none, the root, or all likely ones (default:"
        f" {rule.anchor})",
    )
    group.add_argument(
        "--budget-size",
        choices=list(SIZES),
        help="how many of the B experts are read: B (fixed), as few as hold --budget-mass of the scores (mass), or the"
        f" effective rank of the scores (rank) (default: {rule.size})",
    )
    _add_rule_numbers(group)


def _add_rule_numbers(group: argparse._ArgumentGroup) -> None:
    rule = BudgetConfig
    group.add_argument(
        "--budget-mass",
        type=float,
        metavar="P",
        help=f"share of the scores for --budget-size mass (default: {rule.mass})",
    )
    group.add_argument(
        "--budget-anchor-probability",
        "--budget-guarantee",
        type=float,
        metavar="P",
        help="path probability from which --budget-anchor likely includes a token (default:"
        f" {rule.anchor_probability})",
    )
    group.add_argument(
        "--budget-min-kept-weight",
        "--budget-faithfulness",
        type=float,
        metavar="F",
        help="prune drafted tokens of which a layer keeps less than this share of their own experts' combine weight; 0"
        f" prunes none, 1 with --budget-anchor root or likely is exact (default: {rule.min_kept_weight:g})",
    )
    group.add_argument(
        "--budget-groups",
        type=int,
        metavar="N",
        help="divide the budget evenly among N groups of consecutive experts: with N equal to expert= of --mesh, no"
        f" device reads more than its share; 1 ranks all experts together (default: {rule.groups})",
    )
