"""Find the GPUs and TPU slices that a model fits: `python -m moespec_jax.plan --model Qwen3-30B-A3B --cards`.

Without a GPU or TPU and without the weights. With --cards: sizes of weights, head and caches on NVIDIA cards and
machines with several; also the temporaries of programs, where the CUDA compiler is installed (`pip install
"jax[cuda12]"`); and the least time of a token and of a round. Without --cards: a round of speculative decoding,
compiled for TPU slices (`pip install libtpu`), with the bytes that devices exchange.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.read import load_config, read_config_file
from moespec_jax.cli.arguments import add_tree_flags, mesh_of, tree_of
from moespec_jax.cli.budget_flags import add_budget_flags, budget_of, check_budget
from moespec_jax.cli.command import Parser, count, run_command, write_tables
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded, write_text
from moespec_jax.measure.published_shapes import MODELS, draft_config
from moespec_jax.nn.quantization import QUANTIZATIONS
from moespec_jax.parallel.mesh import MeshConfig, shard_decoder
from moespec_jax.plan.hardware import Hardware, cards_of, slices_of
from moespec_jax.plan.program import Load
from moespec_jax.status_line import showing


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    hardware = cards_of(arguments.cards) if arguments.cards is not None else slices_of(arguments.slices)
    if arguments.cards is not None and arguments.slices is not None:
        raise RequestError("expected either --slices of TPU chips or --cards of GPUs; got both")
    print(*(f"note: {note}" for note in hardware.notes), sep="\n", end="\n" * bool(hardware.notes), file=sys.stderr)
    rows = []
    for row in _rows(arguments, hardware):
        rows.append(row)
        print(hardware.table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    tree, budget = tree_of(arguments) or TreeConfig(), budget_of(arguments)
    about = {
        "versions": hardware.versions(), "cache_slots": arguments.cache_slots, "batch": arguments.batch,
        "tree": dataclasses.asdict(tree), "budget": None if budget is None else budget.as_dict(),
    }  # fmt: skip
    report = json.dumps(about | {"rows": rows}, indent=1) + "\n"
    if arguments.out is not None:
        write_text(arguments.out, report)
    write_tables(report if arguments.json else hardware.table(rows) + "\n" + hardware.legend)


def _rows(arguments: argparse.Namespace, hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Size up every model in every precision on all requested hardware. Without a request, slices of each chip and
    machines with each card follow from the smallest up to the first that fits."""
    tree, budget, mesh = tree_of(arguments) or TreeConfig(), budget_of(arguments), mesh_of(arguments)
    mesh = None if mesh == "auto" else mesh
    if mesh is not None and arguments.batch % mesh.data:
        raise RequestError(f"expected a mesh whose data= divides --batch {arguments.batch}; got {mesh}")
    for name in arguments.model:
        target = config_of(name)
        _check(target, budget, mesh)
        load = Load(target, draft_config(name, target), tree, arguments.cache_slots, arguments.batch, budget, mesh)
        for quantization in arguments.quantization or (None, *QUANTIZATIONS):
            fitting: set[str] = set()
            for where in hardware.names:
                chip = hardware.chip(where)
                if not hardware.requested and chip in fitting:
                    continue
                try:
                    with showing(f"{name}, {quantization or 'bfloat16'}, {where}: compiling"):
                        row = hardware.size_up(load, where, None if quantization == "none" else quantization)
                except ValueError as error:
                    # The model, or the requested mesh, cannot have this number of devices.
                    if not hardware.requested:
                        continue
                    raise RequestError(f"{error} ({name} on {where})") from None
                fitting |= {chip} if row["fits"] else set()
                yield {"model": name, **row}


def _check(target: DecoderConfig, budget: BudgetConfig | None, mesh: MeshConfig | None) -> None:
    """Check that a model can have the budget and the mesh.

    Raises:
        RequestError: it cannot.
    """
    check_budget(budget, target)
    try:
        if mesh is not None:
            shard_decoder(target, mesh)
    except ValueError as error:
        raise RequestError(str(error)) from None


def config_of(name: str) -> DecoderConfig:
    """Read the settings of a published shape by name, of a directory, of a config.json, or of a hub id.

    Raises:
        CheckpointError: there is no such model, or it is not supported.
    """
    if name in MODELS:
        return read_config(MODELS[name])
    path = expanded(name)
    return read_config_file(path) if path.is_file() else load_config(locate(name, patterns=("config.json",)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m moespec_jax.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model",
        nargs="+",
        default=list(MODELS),
        help=f"models: directory, config.json, hub id, or one of {', '.join(MODELS)} (default: all of these)",
    )
    parser.add_argument(
        "--slices",
        nargs="+",
        metavar="SLICE",
        help="v5e-8, v5p-8, ... (default: of each chip, from the smallest slice up to the first that fits)",
    )
    parser.add_argument(
        "--cards",
        nargs="*",
        metavar="CARD",
        help="NVIDIA GPUs in place of TPU slices: RTX4090, H100, 8xH100, ... (without names: of each card, one and more"
        " up to the first machine that fits)",
    )
    parser.add_argument(
        "--quantization",
        nargs="+",
        choices=["none", *QUANTIZATIONS],
        help="precisions of the routed experts; none is bfloat16 (default: all)",
    )
    parser.add_argument(
        "--mesh",
        metavar="expert=4,tensor=2",
        help="sizes of the mesh axes data, expert and tensor; auto: so that devices read equally much (default; see"
        " docs/devices.md)",
    )
    parser.add_argument(
        "--cache-slots",
        type=count,
        default=4096,
        metavar="N",
        help="slots of each cache, for text and tree; generate allocates the next power of two (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=count, default=1, metavar="N", help="number of sequences (default: %(default)s)"
    )
    add_tree_flags(parser.add_argument_group("tree (default: 60/7/10)"))
    add_budget_flags(parser.add_argument_group("expert budget"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    output.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object to a file as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
