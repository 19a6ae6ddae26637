"""A module imports only from those above it, and importing the package loads nothing that decoding does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moespec_jax"

# From the bottom of the stack to its top. A new module takes its place here.
ORDER = [
    "config",
    "mesh",
    "quantization",
    "layers",
    "attention",
    "attention_tpu",
    "cache",
    "tree",
    "routing",
    "budget_config",
    "budget",
    "moe",
    "experts",
    "experts.layouts",
    "experts.blocks",
    "experts.capacity",
    "experts.slots",
    "experts.pallas_tpu",
    "experts.gpu",
    "experts.mosaic_gpu",
    "experts.triton_gpu",
    "experts.cpu",
    "experts.dense",
    "backend",
    "decoder",
    "draft",
    "fields",
    "families",
    "tensors",
    "placement",
    "files",
    "processes",
    "parameters",
    "leaves",
    "orbax_io",
    "checkpoint",
    "export",
    "draft_fields",
    "draft_boundaries",
    "draft_tensors",
    "draft_vocabulary",
    "draft_refusals",
    "draft_config",
    "torch_archive",
    "draft_checkpoint",
    "draft_export",
    "sample",
    "accept",
    "decode",
    "propose",
    "rounds",
    "speculate",
    "state_specs",
    "method",
    "hub",
    "text",
    "programs",
    "results",
    "run",
    "model",
    "loading",
    "profile",
    "",
    "command",
    "process_flags",
    "prompts",
    "arguments",
    "generate_arguments",
    "trace",
    "compare",
    "statistics",
    "generate",
    "demo.corpus",
    "prompt_sets",
    "ledger",
    "shapes",
    "plan",
    "plan.ahead",
    "plan.collectives",
    "plan.program",
    "plan.sizing",
    "plan.table",
    "plan.__main__",
    "ceiling",
    "timing",
    "follow",
    "fidelity",
    "pictures",
    "study",
    "study.rules",
    "study.routing",
    "study.demand",
    "study.coactivation",
    "study.reconstruction",
    "study.measure",
    "study.finding",
    "study.rows",
    "study.conclusion",
    "study.style",
    "study.figures",
    "study.sheets",
    "study.tables",
    "study.page",
    "study.report",
    "study.__main__",
    "bench",
    "bench.random_pair",
    "bench.sweep",
    "bench.verification",
    "bench.rows",
    "bench.table",
    "bench.chart",
    "bench.__main__",
    "train",
    "train.records",
    "train.regenerate",
    "train.rows",
    "train.unroll",
    "train.objective",
    "train.optimizer",
    "train.trainer",
    "train.run",
    "train.__main__",
    "evaluate",
    "evaluate.limited",
    "evaluate.trial",
    "evaluate.answers",
    "evaluate.intervals",
    "evaluate.ways",
    "evaluate.generation",
    "evaluate.loglikelihood",
    "evaluate.texts",
    "evaluate.divergence",
    "evaluate.accuracy",
    "evaluate.rows",
    "evaluate.report",
    "evaluate.chart",
    "evaluate.__main__",
    "evaluate.model_args",
    "evaluate.harness",
    "evaluate.lm_eval",
    "tune",
    "tune.replay",
    "tune.cost",
    "tune.candidates",
    "tune.search",
    "tune.report",
    "tune.__main__",
    "demo",
]


# A result names the version it was made with, which it asks the package for when it is made.
ALLOWED = {("results", "")}


def module_name(path: Path) -> str:
    """`experts.cpu` for `moespec_jax/experts/cpu.py`; the empty name for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(name: str) -> int:
    """A module's place in the order; those of `demo` share one, but for its text, which others measure on."""
    return ORDER.index("demo" if name.split(".")[0] == "demo" and name not in ORDER else name)


def imported(path: Path, modules: set[str]) -> set[str]:
    """Modules of this package imported anywhere in a file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name.removeprefix("moespec_jax.") in modules else str(node.module) for name in whole}
    inside = {name for name in names if name.split(".")[0] == "moespec_jax"}
    return {name.removeprefix("moespec_jax").removeprefix(".") for name in inside}


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_module_has_its_place() -> None:
    assert {name for name in FILES if not name.startswith("demo.") or name in ORDER} == set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_modules_import_from_above_only(name: str) -> None:
    below = {
        other
        for other in imported(FILES[name], set(FILES))
        if place(other) >= place(name)
        and not (name.startswith("demo") and other.startswith("demo"))
        and (name, other) not in ALLOWED
    }
    assert not below, f"{name or 'moespec_jax'} imports {', '.join(sorted(below))}, which the order puts after it"


@pytest.mark.parametrize("name", FILES)
def test_of_flax_only_struct_is_used(name: str) -> None:
    """`import flax` loads linen by itself; nnx, and linen by name, stay out."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flax":
            assert node.module == "flax" and [alias.name for alias in node.names] == ["struct"]
        assert not (isinstance(node, ast.Import) and any(alias.name.startswith("flax") for alias in node.names))


@pytest.mark.parametrize("module", ["moespec_jax", "moespec_jax.generate"])
def test_import_loads_nothing_heavy(module: str) -> None:
    heavy = ["torch", "optax", "orbax", "flax.nnx", "transformers", "matplotlib", "tensorflow", "beartype"]
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
