"""Train the embedded target: python -m moespec_jax.demo.train_target --output DIR.

The same command continues from the last checkpoint in DIR. Every batch is a function of the step, so that a continued
run trains on the same batches as an uninterrupted one. It runs on JAX's default device.
"""

# optax types parameters as arrays and containers; it accepts trees of dataclasses too.
# pyright: reportArgumentType=false

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from moespec_jax.config import DecoderConfig
from moespec_jax.demo.repetition import Batch, loss_with_repetition, repeated
from moespec_jax.demo.target_model import CONFIG, init_params
from moespec_jax.demo.text import bytes_per_token, prepare_text
from moespec_jax.files import write_json
from moespec_jax.nn.attention import Attention, causal_mask
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder, forward, unembed
from moespec_jax.nn.experts.capacity import ExpertStack, capacity_experts, every_expert
from moespec_jax.nn.layer_blocks import Layer
from moespec_jax.nn.moe import RouterInfo, SparseMlp


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of the training.

    Fields:
        steps: number of all steps.
        tokens_per_step: number of tokens in a batch.
        stages: (share of all steps at which the stage begins, sequence length).
        learning_rate: peak learning rate of matrices (Muon).
        adam_learning_rate: peak learning rate of all other parameters (AdamW).
        warmup_steps: length of the linear warm-up.
        decay_from: share of all steps after which the decay begins.
        capacity_factor: slots of an expert, relative to an even distribution of tokens; 0: every expert processes every
            token, which is faster on a GPU.
        repeat_from: share of all steps after which rows with repetitions begin.
        repeat_share: share of such rows in a batch.
        load_balance: weight of the load-balancing loss.
        weight_decay: of matrices.
        dtype: of arithmetic; parameters are float32.
        seed: of initial parameters and of the order of batches.
    """

    steps: int
    tokens_per_step: int = 8192
    stages: tuple[tuple[float, int], ...] = ((0.0, 256), (0.6, 512), (0.9, 1024))
    learning_rate: float = 1e-2
    adam_learning_rate: float = 4e-3
    warmup_steps: int = 60
    decay_from: float = 0.5
    capacity_factor: float = 1.25
    repeat_from: float = 0.5
    repeat_share: float = 0.25
    load_balance: float = 0.01
    weight_decay: float = 0.05
    dtype: str = "float32"
    seed: int = 0


class Metrics(NamedTuple):
    """Metrics of one step.

    Fields:
        loss: cross-entropy of ordinary text in nats a token.
        balance: load-balancing loss; 1 is balanced.
        gradient_norm: global norm of the gradient before clipping.
    """

    loss: jax.Array
    balance: jax.Array
    gradient_norm: jax.Array


def load_balance_loss(config: DecoderConfig, info: RouterInfo) -> jax.Array:
    """Compute the load-balancing loss of Switch Transformer (arXiv:2101.03961): number of experts times the dot product
    of load and mean probability; 1 if both are uniform."""
    load = jnp.mean(jax.nn.one_hot(info.experts, config.num_experts, dtype=jnp.float32), axis=(0, 1))
    return config.num_experts * jnp.sum(load * jnp.mean(info.probabilities, axis=0))


def next_token_loss(config: DecoderConfig, recipe: Recipe, params: Decoder, batch: Batch) -> tuple[jax.Array, Metrics]:
    """Compute the loss of the next tokens of a batch, plus the weighted load-balancing loss."""
    tokens, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    # Looked up in float32: GPUs add gradients of the same row in bfloat16 by compare-and-swap, 8 times the step's time.
    rows = params.embed[tokens].astype(recipe.dtype).reshape(tokens.size, -1)
    own_row = jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape)
    params = jax.tree.map(lambda p: p.astype(recipe.dtype), params)
    experts = functools.partial(capacity_experts, recipe.capacity_factor) if recipe.capacity_factor else every_expert
    backend = Backend("training", "per_expert", False, experts)
    mask = causal_mask(positions, tokens.shape[1])
    looked_up = dataclasses.replace(params, embed=rows)
    hidden, _, info = forward(config, looked_up, own_row, positions, mask, None, backend)
    log_probabilities = -optax.softmax_cross_entropy_with_integer_labels(unembed(params, hidden), targets)
    loss, cross_entropy = loss_with_repetition(log_probabilities, batch)
    balance = jnp.mean(jnp.stack([load_balance_loss(config, router) for router in info.routers]))
    return loss + recipe.load_balance * balance, Metrics(cross_entropy, balance, jnp.zeros(()))


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Build the optimizer: Muon for matrices, AdamW for embedding, router and norms; linear warm-up, constant, then
    linear decay to 2 % of the peak."""

    def schedule(peak: float) -> optax.Schedule:
        decay = round(recipe.decay_from * recipe.steps)
        warm, flat = optax.linear_schedule(0.0, peak, recipe.warmup_steps), optax.constant_schedule(peak)
        cool = optax.linear_schedule(peak, 0.02 * peak, recipe.steps - decay)
        return optax.join_schedules([warm, flat, cool], [recipe.warmup_steps, decay])

    muon = optax.contrib.muon(
        schedule(recipe.learning_rate),
        adam_learning_rate=schedule(recipe.adam_learning_rate),
        adam_b2=0.98,
        weight_decay=recipe.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrix_dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def _matrix_dimensions(params: Decoder) -> Decoder:
    """Mark the axes of the matrices that Muon orthogonalises; parameters of AdamW are None."""
    matrix = optax.contrib.MuonDimensionNumbers
    attention = Attention(q=matrix(1, 0), k=matrix(1, 0), v=matrix(1, 0), o=matrix(0, 1), q_norm=None, k_norm=None)
    layer = Layer(None, attention, None, SparseMlp(router=None))
    stack = ExpertStack(matrix(1, 2), matrix(1, 2), matrix(1, 2))
    count = len(params.layers)
    return Decoder(None, (layer,) * count, (stack,) * count, None, None)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(config: DecoderConfig, recipe: Recipe, params: Decoder, state: optax.OptState, batch: Batch):
    """Run one optimizer step; returns params, state and metrics."""
    loss = functools.partial(next_token_loss, config, recipe)
    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
    updates, state = optimizer(recipe).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, metrics._replace(gradient_norm=optax.global_norm(gradients))


def sequence_length(recipe: Recipe, step: int) -> int:
    """Find the sequence length of a step's stage."""
    return [length for begin, length in recipe.stages if step >= begin * recipe.steps][-1]


def batch_at(recipe: Recipe, stream: np.ndarray, step: int) -> Batch:
    """Select the batch of a step: windows of the stream, without replacement within an epoch, shuffled in each. From
    `repeat_from` on a passage is repeated in some of them."""
    length = sequence_length(recipe, step)
    rows, count = recipe.tokens_per_step // length, (len(stream) - 2 * length) // length
    picks = []
    for index in range(step * rows, (step + 1) * rows):
        offset, order = _epoch(recipe.seed, index // count, length, count)
        start = offset + order[index % count] * length
        picks.append(stream[start : start + length + 1])
    count = round(recipe.repeat_share * rows) if step >= recipe.repeat_from * recipe.steps else 0
    return repeated(np.stack(picks).astype(np.int32), count, np.random.default_rng((recipe.seed, step)))


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, length: int, count: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng((seed, epoch, length))
    return int(rng.integers(length)), rng.permutation(count)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _held_out_loss(config: DecoderConfig, recipe: Recipe, params: Decoder, batch: Batch) -> jax.Array:
    return next_token_loss(config, recipe, params, batch)[1].loss


def quick_bits_per_byte(
    config: DecoderConfig, recipe: Recipe, params: Decoder, stream: np.ndarray, token_bytes: float
) -> float:
    """Estimate held-out bits per byte during training, on 32 evenly spaced windows of 512 tokens."""
    starts = np.linspace(0, len(stream) - 513, 32).astype(int)
    windows = np.stack([stream[s : s + 513] for s in starts]).astype(np.int32)
    batch = repeated(windows, 0, np.random.default_rng(0))
    if recipe.capacity_factor:
        recipe = dataclasses.replace(recipe, capacity_factor=4.0)
    return float(_held_out_loss(config, recipe, params, batch)) / math.log(2) / token_bytes


def train(recipe: Recipe, directory: Path, save_every: int, evaluate_every: int) -> Decoder:
    """Run or continue a recipe in `directory`, with a log in `log.jsonl`; returns the trained parameters."""
    stream, held_out = prepare_text(directory, CONFIG.vocab_size)
    token_bytes = bytes_per_token(directory, held_out)
    params = init_params(CONFIG, jax.random.key(recipe.seed))
    state = optimizer(recipe).init(params)
    manager = ocp.CheckpointManager(directory / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    first = 0
    if (latest := manager.latest_step()) is not None:
        restored = manager.restore(latest, args=ocp.args.StandardRestore({"params": params, "state": state}))
        params, state, first = restored["params"], restored["state"], latest
    batch, started = batch_at(recipe, stream, first), time.perf_counter()
    with tqdm(total=recipe.steps, initial=first, unit="step") as bar, (directory / "log.jsonl").open("a") as log:
        for step in range(first, recipe.steps):
            params, state, metrics = train_step(CONFIG, recipe, params, state, batch)
            # Made while the device computes.
            batch = batch_at(recipe, stream, step + 1)
            row = {"step": step, **{k: float(v) for k, v in metrics._asdict().items()}}
            row["seconds"], started = time.perf_counter() - started, time.perf_counter()
            if (step + 1) % evaluate_every == 0 or step + 1 == recipe.steps:
                row["held_out_bits_per_byte"] = quick_bits_per_byte(CONFIG, recipe, params, held_out, token_bytes)
            print(json.dumps(row), file=log, flush=True)
            bar.set_postfix(loss=f"{row['loss']:.3f}", balance=f"{row['balance']:.2f}")
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
                manager.save(step + 1, args=ocp.args.StandardSave({"params": params, "state": state}))
    manager.wait_until_finished()
    return params


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory of tokenizer, checkpoints and log"
    )
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--tokens-per-step", type=int, default=8192, metavar="N", help="tokens of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of arithmetic (default: %(default)s)"
    )
    parser.add_argument(
        "--capacity-factor",
        type=float,
        default=1.25,
        metavar="F",
        help="slots of an expert, relative to an even distribution of tokens; 0: every expert processes every token,"
        " which is faster on a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--save-every", type=int, default=50, metavar="N", help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluate-every", type=int, default=100, metavar="N", help="steps between evaluations (default: %(default)s)"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        arguments.steps, arguments.tokens_per_step, dtype=arguments.dtype, capacity_factor=arguments.capacity_factor
    )
    write_json(arguments.output / "recipe.json", dataclasses.asdict(recipe))
    train(recipe, arguments.output.absolute(), arguments.save_every, arguments.evaluate_every)


if __name__ == "__main__":
    main()
