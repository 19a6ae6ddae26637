"""Flags shared by several commands (model, tree, profile) and their values."""

import argparse
import sys
from typing import Literal

from moespec_jax.cli.budget_flags import budget_of, check_budget
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded, parse_numbers
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.quantization import QUANTIZATIONS
from moespec_jax.parallel.mesh import MeshConfig, parse_mesh
from moespec_jax.runtime.load import DEMO_DRAFT, DEMO_TARGET, load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.profile_costs import read_costs
from moespec_jax.runtime.tuned_profile import read_profile

# Of weights and activations.
DTYPES = ("float32", "bfloat16", "float16")


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
        backend=backend_of(arguments),
        mesh=mesh_of(arguments),
        progress=sys.stderr.isatty(),
        check=check,
    )


def backend_of(arguments: argparse.Namespace) -> Backend | None:
    """Back-end of `--backend`; None without it."""
    return None if arguments.backend is None else BACKENDS[arguments.backend]


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
    tree, budget, max_kl = tree_of(arguments), budget_of(arguments), max_kl_of(arguments)
    if getattr(arguments, "speculate", None) == "auto":
        if tree is not None:
            raise RequestError("expected --speculate auto or the tree of flags; got both")
        if arguments.profile is None:
            return DecodingSpec("auto", budget)
        if budget is not None:
            raise RequestError("expected a budget either from --profile, whose costs are of its own, or from flags")
        return DecodingSpec(**read_costs(arguments.profile, max_kl=max_kl))
    if arguments.profile is None:
        return DecodingSpec(tree or "default", budget)
    if tree is not None or budget is not None:
        raise RequestError("expected a tree and a budget either from --profile or from flags; got both")
    return DecodingSpec(**read_profile(arguments.profile, max_kl=max_kl))


def max_kl_of(arguments: argparse.Namespace) -> float | None:
    """Read `--max-kl`; None without it.

    Raises:
        RequestError: there is no profile to choose a setting from.
    """
    if arguments.max_kl is not None and arguments.profile is None:
        raise RequestError("--max-kl chooses among the settings of a profile; expected --profile with it")
    return arguments.max_kl


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
        help="draft head (EAGLE-3, DFlash or DSpark): a directory or a hub id; without one, ngram: draft from the text"
        " so far; self:K: draft with the target, K experts a token (docs/drafters.md); none: plain decoding (default:"
        " the embedded head with the embedded target, none with any other)",
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
        choices=DTYPES,
        help="dtype of weights and activations (default: float32 on CPU, bfloat16 elsewhere)",
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="quantize the routed experts: int8 in half the bytes of bfloat16, slightly different output; mxfp4 in"
        " about a quarter, as published where the checkpoint has them in MXFP4, otherwise coarsely rounded",
    )
    group.add_argument(
        "--backend",
        choices=list(BACKENDS),
        help="expert compute and layout of the weights (default: the fastest measured on the device; docs/gpu.md)",
    )
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="directory that keeps compiled programs, or none (default: JAX_COMPILATION_CACHE_DIR if set, else"
        " ~/.cache/moespec_jax/xla)",
    )


def add_mesh_flag(group: argparse._ArgumentGroup) -> None:
    """Add the flag that shards the model over several devices."""
    group.add_argument(
        "--mesh",
        metavar="data=1,expert=4,tensor=2",
        help="shard over devices: sequences over data, the experts of a layer over expert, the width of an expert over"
        " tensor, attention and output head over expert and tensor together; auto: over all devices (default: one"
        " device)",
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


def add_speculate_flag(group: argparse._ArgumentGroup) -> None:
    """Add the flag by which every round chooses its shape."""
    group.add_argument(
        "--speculate",
        choices=["auto"],
        help="auto: choose for every round between plain decoding and a few trees, by the costs of rounds on this"
        " device and what they gain in this text; costs are those of --profile or else measured in the first runs and"
        " kept beside the compiled programs; the default where they were measured before and there is no budget",
    )


def add_profile_flag(group: argparse._ArgumentGroup) -> None:
    """Add the flags that read tree and budget from a file."""
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="profile written by python -m moespec_jax.tune: its tree and budget, in place of the flags for them; with"
        " --speculate auto its budget and costs of rounds",
    )
    group.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="with --profile: the fastest of all settings timed for it whose measured divergence from the exact target"
        " is at most X nats a token, in place of its own; lossy unless that is an exact one",
    )
