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
from tokenizers import Tokenizer
from tqdm import tqdm

from moespec_jax.config import DecoderConfig, RopeConfig
from moespec_jax.measure import corpus
from moespec_jax.nn.attention import Attention, causal_mask
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder, Layer, forward, unembed
from moespec_jax.nn.experts.capacity import ExpertStack, capacity_experts
from moespec_jax.nn.moe import RouterInfo, SparseMlp

LAYERS = 4
CONFIG = DecoderConfig(
    model_type="qwen3_moe",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    max_position_embeddings=1024,
    sparse_layers=(True,) * LAYERS,
    sliding_windows=(0,) * LAYERS,
    rope=RopeConfig(rope_theta=10_000.0),
    norm_topk_prob=True,
    tie_word_embeddings=True,
    qk_norm="head",
)


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
        capacity_factor: slots of an expert, relative to an even distribution of tokens.
        load_balance: weight of the load-balancing loss.
        weight_decay: of matrices.
        dtype: of arithmetic; parameters are float32.
        seed: of initial parameters and of the order of batches.
    """

    steps: int
    tokens_per_step: int = 8192
    stages: tuple[tuple[float, int], ...] = ((0.0, 256), (0.6, 512), (0.9, 1024))
    learning_rate: float = 1.2e-2
    adam_learning_rate: float = 5e-3
    warmup_steps: int = 60
    decay_from: float = 0.5
    capacity_factor: float = 1.25
    load_balance: float = 0.01
    weight_decay: float = 0.05
    dtype: str = "float32"
    seed: int = 0


class Metrics(NamedTuple):
    """Metrics of one step.

    Fields:
        loss: cross-entropy in nats a token.
        balance: load-balancing loss; 1 is balanced.
        gradient_norm: global norm of the gradient before clipping.
    """

    loss: jax.Array
    balance: jax.Array
    gradient_norm: jax.Array


def init_params(config: DecoderConfig, key: jax.Array) -> Decoder:
    """Draw initial parameters in float32; matrices whose output is added to the residual stream are zero."""
    d, h, f, n = config.hidden_size, config.head_dim, config.moe_intermediate_size, config.num_experts
    q, kv = config.num_attention_heads * h, config.num_key_value_heads * h
    keys = iter(jax.random.split(key, 7 * config.num_hidden_layers + 1))

    def normal(*shape: int, fan_in: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32) * 0.6 * fan_in**-0.5

    def layer() -> Layer:
        attention = Attention(
            q=normal(q, d, fan_in=d), k=normal(kv, d, fan_in=d), v=normal(kv, d, fan_in=d), o=jnp.zeros((q, d)),
            q_norm=jnp.ones(h), k_norm=jnp.ones(h),
        )  # fmt: skip
        return Layer(jnp.ones(d), attention, jnp.ones(d), SparseMlp(router=normal(n, d, fan_in=d) * 0.5))

    def experts() -> ExpertStack:
        return ExpertStack(normal(n, d, f, fan_in=d), normal(n, d, f, fan_in=d), jnp.zeros((n, f, d)))

    embed = jax.random.normal(next(keys), (config.vocab_size, d), jnp.float32) * 0.02
    layers = tuple(layer() for _ in range(config.num_hidden_layers))
    return Decoder(embed, layers, tuple(experts() for _ in layers), jnp.ones(d), None)


def load_balance_loss(config: DecoderConfig, info: RouterInfo) -> jax.Array:
    """Compute the load-balancing loss of Switch Transformer (arXiv:2101.03961): number of experts times the dot product
    of load and mean probability; 1 if both are uniform."""
    load = jnp.mean(jax.nn.one_hot(info.experts, config.num_experts, dtype=jnp.float32), axis=(0, 1))
    return config.num_experts * jnp.sum(load * jnp.mean(info.probabilities, axis=0))


def next_token_loss(
    config: DecoderConfig, recipe: Recipe, params: Decoder, batch: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Compute the cross-entropy of the next tokens `batch[:, 1:]`, plus the weighted load-balancing loss."""
    params = jax.tree.map(lambda p: p.astype(recipe.dtype), params)
    tokens, targets = batch[:, :-1], batch[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    backend = Backend("capacity", "per_expert", False, functools.partial(capacity_experts, recipe.capacity_factor))
    mask = causal_mask(positions, tokens.shape[1])
    hidden, _, info = forward(config, params, tokens, positions, mask, None, backend)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(unembed(params, hidden), targets))
    balance = jnp.mean(jnp.stack([load_balance_loss(config, router) for router in info.routers]))
    return loss + recipe.load_balance * balance, Metrics(loss, balance, jnp.zeros(()))


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
def train_step(config: DecoderConfig, recipe: Recipe, params: Decoder, state: optax.OptState, batch: jax.Array):
    """Run one optimizer step on a batch `[sequences, length + 1]`; returns params, state and metrics."""
    loss = functools.partial(next_token_loss, config, recipe)
    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
    updates, state = optimizer(recipe).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, metrics._replace(gradient_norm=optax.global_norm(gradients))


def sequence_length(recipe: Recipe, step: int) -> int:
    """Find the sequence length of a step's stage."""
    return [length for begin, length in recipe.stages if step >= begin * recipe.steps][-1]


def batch_at(recipe: Recipe, stream: np.ndarray, step: int) -> np.ndarray:
    """Select the batch of a step: windows of the stream, without replacement within an epoch, shuffled in each."""
    length = sequence_length(recipe, step)
    rows, count = recipe.tokens_per_step // length, (len(stream) - 2 * length) // length
    picks = []
    for index in range(step * rows, (step + 1) * rows):
        offset, order = _epoch(recipe.seed, index // count, length, count)
        start = offset + order[index % count] * length
        picks.append(stream[start : start + length + 1])
    return np.stack(picks)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, length: int, count: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng((seed, epoch, length))
    return int(rng.integers(length)), rng.permutation(count)


def prepare_text(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train the tokenizer and tokenize both texts, or read them from `directory`; returns the training stream and the
    held-out stream."""
    if not (directory / "streams.npz").exists():
        documents, held_out = corpus.training_documents(), corpus.held_out_documents()
        tokenizer = corpus.train_tokenizer(list(dict.fromkeys(documents)), CONFIG.vocab_size)
        tokenizer.save(str(directory / "tokenizer.json"))
        np.random.default_rng(0).shuffle(documents)
        sizes = {
            "train_bytes": sum(len(d.encode()) for d in documents),
            "held_out_bytes": sum(len(d.encode()) for d in held_out),
        }
        (directory / "corpus.json").write_text(json.dumps(corpus.corpus_versions() | sizes))
        np.savez(
            directory / "streams.npz",
            train=corpus.encode_documents(tokenizer, documents),
            held_out=corpus.encode_documents(tokenizer, held_out),
        )
    with np.load(directory / "streams.npz") as streams:
        return streams["train"], streams["held_out"]


def bytes_per_token(directory: Path, held_out: np.ndarray) -> float:
    """Compute the mean number of bytes in a token of the held-out text."""
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).decode(held_out.tolist(), skip_special_tokens=True)
    return len(text.encode()) / len(held_out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _held_out_loss(config: DecoderConfig, recipe: Recipe, params: Decoder, batch: jax.Array) -> jax.Array:
    return next_token_loss(config, recipe, params, batch)[1].loss


def quick_bits_per_byte(
    config: DecoderConfig, recipe: Recipe, params: Decoder, stream: np.ndarray, token_bytes: float
) -> float:
    """Estimate held-out bits per byte during training, on 32 evenly spaced windows of 512 tokens."""
    starts = np.linspace(0, len(stream) - 513, 32).astype(int)
    batch = np.stack([stream[s : s + 513] for s in starts])
    return (
        float(_held_out_loss(config, dataclasses.replace(recipe, capacity_factor=4.0), params, batch))
        / math.log(2)
        / token_bytes
    )


def train(recipe: Recipe, directory: Path, save_every: int, evaluate_every: int) -> Decoder:
    """Run or continue a recipe in `directory`, with a log in `log.jsonl`; returns the trained parameters."""
    stream, held_out = prepare_text(directory)
    token_bytes = bytes_per_token(directory, held_out)
    params = init_params(CONFIG, jax.random.key(recipe.seed))
    state = optimizer(recipe).init(params)
    manager = ocp.CheckpointManager(directory / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    first = 0
    if (latest := manager.latest_step()) is not None:
        restored = manager.restore(latest, args=ocp.args.StandardRestore({"params": params, "state": state}))
        params, state, first = restored["params"], restored["state"], latest
    with tqdm(total=recipe.steps, initial=first, unit="step") as bar, (directory / "log.jsonl").open("a") as log:
        for step in range(first, recipe.steps):
            started = time.perf_counter()
            params, state, metrics = train_step(CONFIG, recipe, params, state, batch_at(recipe, stream, step))
            row = {
                "step": step,
                **{k: float(v) for k, v in metrics._asdict().items()},
                "seconds": time.perf_counter() - started,
            }
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
        "--save-every", type=int, default=50, metavar="N", help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluate-every", type=int, default=100, metavar="N", help="steps between evaluations (default: %(default)s)"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=arguments.steps, tokens_per_step=arguments.tokens_per_step, dtype=arguments.dtype)
    train(recipe, arguments.output.absolute(), arguments.save_every, arguments.evaluate_every)


if __name__ == "__main__":
    main()
