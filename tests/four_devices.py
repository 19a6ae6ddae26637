"""One training step on one device and on four: a program of its own, for the number of devices is settled at start.
Prints how much the gradients, the metrics and the held-out accuracies differ."""

import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from driver import build, random_tensors
from jax.sharding import Mesh
from speculation import draft_config, small_head
from test_decoder import CONFIG

from moespec_jax.nn.backend import Backend
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.train import run, trainer
from moespec_jax.train.optimizer import OptimizerConfig
from moespec_jax.train.rows import Rows

BATCH, LENGTH = 4, 10


def main() -> None:
    """Take both steps and compare."""
    jax.config.update("jax_default_matmul_precision", "highest")
    trainer.build_optimizer = lambda _: optax.sgd(1.0)
    backend = Backend("dense", "flat", False, dense_experts)
    params, draft = build(CONFIG, random_tensors(CONFIG, seed=1), backend), draft_config(CONFIG)
    head = small_head(draft, params)
    recipe = trainer.Recipe(CONFIG, draft, OptimizerConfig(1), batch=BATCH, length=LENGTH, unroll=2, recompute=False)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
    # Unlike numbers of tokens that count: a mean of the devices' means would show.
    rows = Rows(ids, np.arange(LENGTH + 1)[None, :] < np.array([11, 3, 0, 7])[:, None])
    model: Any = types.SimpleNamespace(config=CONFIG, params=params, backend=backend)
    moved, metrics, held_out = [], [], []
    for mesh in (Mesh(np.array(jax.devices()[:1]), ("data",)), trainer.data_mesh(BATCH)):
        before = trainer.initial_state(recipe, head, mesh)
        held_out.append(run.held_out_accuracy(recipe, model, head.target_ids, before, rows))
        old = jax.tree.map(np.array, before.head)
        batch = trainer.shard_batch(mesh, rows)
        state, measured = trainer.train_step(recipe, backend, mesh, params, head.target_ids, before, batch)
        moved.append(jax.tree.leaves(jax.tree.map(lambda new, old: np.asarray(new) - old, state.head, old)))
        metrics.append(jax.tree.leaves(jax.tree.map(np.asarray, measured)))
    found = {
        "devices": jax.device_count(),
        "largest": max(float(np.abs(x).max()) for x in moved[0]),
        "difference": _apart(*moved),
        "metrics": _apart(*metrics),
        "held_out": _apart(*(list(map(np.asarray, x)) for x in held_out)),
    }
    print(json.dumps(found))


def _apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
