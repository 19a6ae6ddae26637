"""Export the embedded target from a training run: python -m moespec_jax.demo.finish_target --training DIR.

Writes the model in Hugging Face format, loads it as any other, and measures it on the held-out modules: bits per byte,
load of the experts, router mass of the heaviest experts, and how often greedy text ends in a loop. Writes a record of
these, and a plot of the training.
"""

# optax does not type trees of dataclasses.
# pyright: reportArgumentType=false

import argparse
import dataclasses
import json
import lzma
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer
from tqdm import tqdm

from moespec_jax.checkpoint.write import export
from moespec_jax.demo.target_model import CONFIG, init_params
from moespec_jax.demo.train_target import Recipe, optimizer
from moespec_jax.files import write_json
from moespec_jax.measure import corpus
from moespec_jax.measure.prompt_sets import continued, held_out_pieces
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.decoder import Decoder, forward, unembed
from moespec_jax.nn.layers import GatedMlp
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model

WINDOW, STRIDE = 1024, 512
TREE_ROWS = 60
LOOP_PROMPTS, LOOP_TOKENS, LOOP_PERIOD = 20, 128, 40


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", type=Path, required=True, metavar="DIR", help="--output of the training run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "target",
        metavar="DIR",
        help="directory of the model (default: %(default)s)",
    )
    arguments = parser.parse_args()
    tokens_per_step = json.loads((arguments.training / "recipe.json").read_text())["tokens_per_step"]
    step = export_checkpoint(arguments.training.absolute(), arguments.output)
    model = load(str(arguments.output), dtype="float32", backend=BACKENDS["switch"])
    documents = corpus.held_out_documents()
    record = {
        "steps": step,
        "tokens": step * tokens_per_step,
        "corpus": json.loads((arguments.training / "corpus.json").read_text()),
        "held_out": list(corpus.HELD_OUT),
        **measure(model, documents),
        f"loops_of_{LOOP_PROMPTS}": greedy_loops(model),
        "xz_bits_per_byte": xz_bits_per_byte(list(dict.fromkeys(corpus.training_documents())), documents),
    }
    write_json(arguments.output.parent / "target_record.json", record)
    draw_training(arguments.training / "log.jsonl", tokens_per_step, arguments.output.parent / "target_training.png")


def export_checkpoint(training: Path, output: Path) -> int:
    """Write the last checkpoint of a run and its tokenizer in Hugging Face format, in bfloat16; returns its step."""
    manager = ocp.CheckpointManager(training / "checkpoints")
    step = manager.latest_step()
    assert step is not None, f"expected a checkpoint in {training}"
    params = init_params(CONFIG, jax.random.key(0))
    state = optimizer(Recipe(steps=step)).init(params)
    trained = manager.restore(step, args=ocp.args.StandardRestore({"params": params, "state": state}))["params"]
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(training / "tokenizer.json"))
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    export(_per_expert(trained), CONFIG, output, "bfloat16", extra={"eos_token_id": end, "bos_token_id": end})
    tokenizer.save(str(output / "tokenizer.json"))
    names = {"eos_token": corpus.END_OF_TEXT, "bos_token": corpus.END_OF_TEXT, "pad_token": corpus.END_OF_TEXT}
    limit = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONFIG.max_position_embeddings}
    write_json(output / "tokenizer_config.json", names | limit)
    write_json(output / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    return step


def _per_expert(params: Decoder) -> Decoder:
    """Split the trainer's stacked experts into arrays of one expert, a layout that `export` supports."""
    layers = tuple(
        tuple(GatedMlp(stack.gate[e], stack.up[e], stack.down[e]) for e in range(CONFIG.num_experts))
        for stack in params.experts  # pyright: ignore[reportGeneralTypeIssues]
    )
    return dataclasses.replace(params, experts=layers)


def measure(model: Model, documents: list[str]) -> dict[str, Any]:
    """Measure bits per byte and routing on documents, in overlapping windows of each.

    Every token is predicted once, after at least `WINDOW - STRIDE` tokens where the document has as many before it.
    """
    nats, load_count = 0.0, 0.0
    tails: list[np.ndarray] = []
    score = jax.jit(partial(_score_window, model))
    for document in tqdm(documents, desc="held-out documents"):
        ids = np.array([model.stop_ids[0], *model.encode(document)], np.int32)
        for start in range(0, max(1, len(ids) - 1 - (WINDOW - STRIDE)), STRIDE):
            window = ids[start : start + WINDOW + 1]
            fresh = 0 if start == 0 else WINDOW - STRIDE
            padded = np.zeros(WINDOW + 1, np.int32)
            padded[: len(window)] = window
            losses, load, tail = score(model.params, jnp.asarray(padded[None]))
            nats += float(np.sum(np.asarray(losses)[fresh : len(window) - 1], dtype=np.float64))
            if len(window) == WINDOW + 1:
                load_count += np.asarray(load)
                tails.append(np.asarray(tail))
    size = sum(len(document.encode()) for document in documents)
    return {"held_out_bytes": size, "bits_per_byte": nats / math.log(2) / size} | _routing(load_count, np.stack(tails))


def _score_window(model: Model, params: Decoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute losses `[WINDOW]`, the number of selections of each expert `[layers, experts]`, and the mean router
    probability of the experts over every `TREE_ROWS` tokens, in descending order `[layers, runs, experts]`."""
    positions = jnp.arange(WINDOW, dtype=jnp.int32)[None]
    mask = causal_mask(positions, WINDOW)
    hidden, _, info = forward(model.config, params, tokens[:, :-1], positions, mask, None, model.backend)
    losses = optax.softmax_cross_entropy_with_integer_labels(unembed(params, hidden), tokens[:, 1:])[0]
    count = model.config.num_experts
    load = jnp.stack([jnp.sum(jax.nn.one_hot(r.experts, count), axis=(0, 1)) for r in info.routers])
    runs = WINDOW // TREE_ROWS
    mass = jnp.stack([r.probabilities[: runs * TREE_ROWS].reshape(runs, TREE_ROWS, -1).mean(1) for r in info.routers])
    return losses, load, -jnp.sort(-mass, axis=-1)


def _routing(load: Any, tails: np.ndarray) -> dict[str, Any]:
    """Summarise the largest and smallest load relative to the mean, and the mass kept by the B heaviest experts."""
    load, tails = load.astype(np.float64), tails.astype(np.float64)
    relative = load / load.mean(axis=1, keepdims=True)
    kept = np.cumsum(tails.mean(axis=(0, 2)), axis=-1)
    return {
        "load_max_over_mean": relative.max(axis=1).round(3).tolist(),
        "load_min_over_mean": relative.min(axis=1).round(3).tolist(),
        f"mass_kept_of_{TREE_ROWS}_tokens": {str(b): kept[:, b - 1].round(4).tolist() for b in (4, 8, 12, 16, 24, 32)},
    }


def greedy_loops(model: Model) -> int:
    """Count the held-out prompts of `LOOP_PROMPTS` whose greedy continuation ends in a loop."""
    prompts = held_out_pieces(model, LOOP_PROMPTS)
    return sum(ends_in_loop(ids) for ids in continued(model, prompts, LOOP_TOKENS))


def ends_in_loop(ids: list[int]) -> bool:
    """Test whether the last tokens are one passage of at most `LOOP_PERIOD` tokens three times, or a shorter one as
    often as fits into 16 tokens."""
    repeats = [max(2 * period, 16) for period in range(1, LOOP_PERIOD + 1)]
    return any(ids[-n:] == ids[-n - period : -period] for period, n in enumerate(repeats, 1))


def xz_bits_per_byte(training: list[str], held_out: list[str]) -> float:
    """Measure the baseline without a model: bits that `xz -9e` adds for the held-out text after the training text."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 << 20}]

    def size(text: bytes) -> int:
        return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))

    before, after = "".join(training).encode(), "".join(held_out).encode()
    return (size(before + after) - size(before)) * 8 / len(after)


def draw_training(log: Path, tokens_per_step: int, picture: Path) -> None:
    """Plot training loss and held-out bits per byte by tokens of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
    tokens = tokens_per_step / 1e6
    steps = sorted(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.plot([(s + 1) * tokens for s in steps], [rows[s]["loss"] for s in steps], linewidth=0.8, color="#1f77b4")
    left.set(xlabel="million tokens", ylabel="training loss (nats per token)", ylim=(1, 6))
    held = [s for s in steps if "held_out_bits_per_byte" in rows[s]]
    right.plot([(s + 1) * tokens for s in held], [rows[s]["held_out_bits_per_byte"] for s in held], "o-", color="C3")
    right.set(xlabel="million tokens", ylabel="held-out bits per byte (on 32 windows)", ylim=(0.75, 2.1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
