"""The commands that `benchmarks.kill` kills, and what of their output must be the same however they came to it.

Compared by content: every file, and arrays and not files of what orbax writes, which names its files at random. Left
out is what a clock said and cannot say twice: `seconds` in a training run's log.jsonl; of the bench everything but
settings, tokens and counts. What ends in `.incomplete` or `-tmp`, and conversion's mark, are scaffolding and no result.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from convert import MARK
from moespec_jax.bench.random_pair import random_model
from moespec_jax.checkpoint.head.read import LoadedDraft, load_draft
from moespec_jax.checkpoint.head.write import export_draft
from moespec_jax.checkpoint.read import load_config, open_source
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.checkpoint.write import export
from moespec_jax.errors import CheckpointError

# Of a line of bench.jsonl, and of the value of a turn, what no clock says.
_COUNTS = (
    "setting prompts count tree budget rounds accept_length accepted_by_depth exact experts_wanted experts_read"
    " mass_kept tokens_replaced tokens token_ids"
).split()
_TIMED_FILES = ("bench.md", "bench.png")
_SHARDS = "--max-shard-bytes 2000000 --dtype bfloat16".split()
_TRAINING = (
    "--steps 8 --batch 2 --length 20 --unroll 2 --warmup-steps 1 --save-every 1 --evaluate-every 4"
    " --draft-vocab-size 64 --intermediate-size 32 --boundaries 1,2,3"
).split()
_TOY = ("--random toy --count 2 --tokens 10 --longest-prompt 10 --repeats 2 --trees 6/2/2 --budgets 0.25").split()
Contents = dict[str, Any]


class Task(NamedTuple):
    """A command without its `--output`; `journals` are the files it adds to, `refused` says in one line why what it
    left is no result (None: it is one), `results` names what there is when all is done, `share` weighs its kills."""

    name: str
    command: tuple[str, ...]
    results: tuple[str, ...]
    share: int
    refused: Callable[[Path], str | None] = lambda output: None
    journals: tuple[str, ...] = ()


def make_tasks(place: Path) -> dict[str, Task]:
    """All commands, with what they read made in `place`: a toy pair, a few texts, a checkpoint in each format."""
    target, head, texts = write_toys(place)
    embedded = str(Path(sys.modules["moespec_jax"].__file__ or "").parent / "demo" / "target")
    pair = ("--model", str(target), "--draft-model", str(head))
    few = "--count 2 --batch 2 --longest-prompt 16 --tokens 4 --tree-depth 1 --tree-top-k 2 --tree-size 5".split()
    rule = ("--rules", "path, squares (default)", "--rounds", "2", "--budgets", "4", "--timed-prompts", "0")
    data = ("--model", str(target), "--data", str(texts), "--held-out", str(texts))
    tasks = [
        Task("to_orbax", ("convert.to_orbax", "--model", embedded), ("config.json", "orbax"), 10, _refused_target),
        Task(
            "to_hf", ("convert.to_hf", "--model", embedded, *_SHARDS), ("config.json", "model.safetensors.index.json"),
            8, _refused_target,
        ),
        Task(
            "train", ("moespec_jax.train", *data, *_TRAINING), ("head/config.json", "training.png"), 16,
            partial(_refused_head, target), ("log.jsonl",),
        ),
        Task("study", ("moespec_jax.study", *pair, *few, *rule), ("study.html",), 12, journals=("study.jsonl",)),
        Task(
            "evaluate", ("moespec_jax.evaluate", *pair, *few, "--expert-budget", "4"), ("evaluate.jsonl",), 8,
            journals=("pieces.jsonl",),
        ),
        Task("bench", ("moespec_jax.bench", *_TOY), ("bench.jsonl",), 6, journals=("turns.jsonl",)),
    ]  # fmt: skip
    return {task.name: task for task in tasks}


def write_toys(place: Path) -> tuple[Path, Path, Path]:
    """A random target with a tokenizer of bytes, its random head, and a file of texts."""
    toy = random_model("toy", None, "float32")
    assert isinstance(toy.draft, LoadedDraft)
    target, head, texts = place / "target", place / "head", place / "texts.jsonl"
    export(toy.params, toy.config, target, "float32")
    byte_tokenizer().save(str(target / "tokenizer.json"))
    export_draft(toy.draft.head, toy.draft.config, head, "speculators", target=toy.config,
        target_embedding=toy.params.embed)  # fmt: skip
    lines = [f"def add{i}(a, b):\n    return a + {i} * b\n\nprint(add{i}(1, 2))\n" for i in range(6)]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return target, head, texts


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, and a text its bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def contents(output: Path) -> Contents:
    """What a command has written so far, by name: the hash of a file, the lines of a journal."""
    found: Contents = {}
    if not output.exists():
        return found
    for file in sorted(p for p in output.rglob("*") if p.is_file()):
        name = file.relative_to(output).as_posix()
        if name == MARK or any(part.endswith(".incomplete") for part in file.relative_to(output).parts):
            continue
        if name.startswith(("orbax/", "checkpoints/")):
            continue
        found[name] = _lines(file) if file.suffix == ".jsonl" else hashlib.sha256(file.read_bytes()).hexdigest()
    if (output / "orbax").exists():
        found["orbax"] = _hash_of_target(output)
    if (last := last_checkpoint(output)) is not None:
        found["checkpoints"] = {last.name: _hash_of_state(last)}
    return {name: value for name, value in found.items() if name not in _TIMED_FILES} | {
        name: "" for name in _TIMED_FILES if name in found
    }


def last_checkpoint(output: Path) -> Path | None:
    """The last checkpoint of a training run that was saved to its end."""
    steps = [path for path in (output / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name), default=None)


def violations(found: Contents, whole: Contents, journals: tuple[str, ...]) -> list[str]:
    """Names of what a kill left that is neither the whole run's nor the beginning of it."""
    bad = []
    for name, value in found.items():
        if name in journals:
            right = value == whole[name][: len(value)]
        elif name == "checkpoints":
            # Only the last one of the whole run is there to compare with: others show in what comes of them.
            right = all(kept == whole[name].get(step, kept) for step, kept in value.items())
        else:
            right = value == whole.get(name)
        bad += [] if right else [name]
    return bad


def _lines(file: Path) -> list[Any]:
    """The whole lines of a journal, each without what a clock said."""
    text = file.read_text(encoding="utf-8")
    return [_timeless(file.name, json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def _timeless(name: str, line: Mapping[str, Any]) -> Any:
    if name == "log.jsonl":
        return {key: value for key, value in line.items() if key != "seconds"}
    if name == "bench.jsonl":
        return {key: line[key] for key in _COUNTS if key in line}
    if name == "turns.jsonl" and "task" in line:
        value = line["value"]
        return line["task"], {key: value[key] for key in _COUNTS if key in value} if isinstance(value, dict) else None
    return line


def _hash_of_target(directory: Path) -> str:
    """Hash of every tensor's name and bytes, equal for all formats."""
    config, digest = load_config(directory), hashlib.sha256()
    for name, array in open_source(directory, config).read(tensor_table(config)):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _hash_of_state(step: Path) -> str:
    import orbax.checkpoint as ocp

    with warnings.catch_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        warnings.simplefilter("ignore")  # of other devices than those it was saved from
        state: Any = checkpointer.restore((step / "default").absolute())
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _refused_target(output: Path) -> str | None:
    """Why the converted model, under its name or the one it has while it is made, does not load."""
    directory = output if output.exists() else output.with_name(output.name + ".incomplete")
    return _why(lambda: _hash_of_target(directory))


def _refused_head(target: Path, output: Path) -> str | None:
    """Why the trained head does not load."""
    return _why(lambda: load_draft(output / "head", load_config(target), None))


def _why(load: Callable[[], object]) -> str | None:
    try:
        load()
    except CheckpointError as error:
        return str(error)
    return None
