"""Gains of drafters without a head: `python -m benchmarks.drafters --out benchmarks/results`.

n-grams: the embedded target continues prompts plainly, greedily and at temperature 1, and the trees that would be
drafted along its text are replayed: the text does not depend on them. Prompts are pieces of the held-out modules (64
tokens each), pieces that are asked for again (200 tokens and the first 8 of them), and any set given with `--prompts
NAME=FILE` (first turns, cut to their last 256 tokens). Other texts are given, not generated: pieces, and pieces that
are followed by themselves with every `self` changed, as in an edit. Lengths count the bonus token.

The target itself with K experts a token: how often its first drafted token is accepted, of the embedded target on
held-out modules, and of a random target of each family. Times are the least of drafting one tree with n-grams, by
length of the buffer.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.acceptance import LONGEST, summary
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.parameters import random_decoder
from moespec_jax.cli.prompts import read_prompt_file
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.ngram_drafter import NgramDrafter, draft_continuations
from moespec_jax.measure.prompt_sets import held_out_pieces
from moespec_jax.measure.teacher_forcing import take_path
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.drafters import NGRAM_TREE, named_draft
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model

NEW, PIECE, AGAIN = 96, 200, 8
TREES = (TreeConfig(2, 1, 4), TreeConfig(6, 1, 8), NGRAM_TREE, TreeConfig(14, 1, 16), TreeConfig(14, 4, 16))
PAIR = TreeConfig(0, 1, 2)
BUFFERS = (256, 2048, 16384)
_SHAPE: dict[str, Any] = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=4,
    max_position_embeddings=1024, rms_norm_eps=1e-6,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": dict(intermediate_size=32, norm_topk_prob=False),
    "qwen3_moe": dict(norm_topk_prob=True),
    "qwen2_moe": dict(shared_expert_intermediate_size=32),
    "mixtral": dict(intermediate_size=32, num_local_experts=8, num_experts_per_tok=2),
}


def main() -> int:
    """Measure, and write `drafters.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="directory to write drafters.json to (default: print)")
    parser.add_argument("--prompts", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--count", type=int, default=16, help="prompts of each set")
    parser.add_argument("--busy", action="store_true", help="other programs run beside this one")
    options = parser.parse_args()
    model = load(dtype="float32")
    where = model.generate([[0]], max_new_tokens=1)
    about: dict[str, Any] = {
        "new_tokens": NEW,
        "device": where.device,
        "idle": not options.busy,
        "versions": where.versions,
    }
    about["xla_flags"] = os.environ.get("XLA_FLAGS")
    report: dict[str, Any] = about | {
        "ngram_us": ngram_times(),
        "rows": [*generated(model, prompt_sets(model, options)), *given(model, options.count)],
        "agreement": [*own_agreement(model, options.count), *random_agreement()],
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "drafters.json").write_text(text)
    return 0


def prompt_sets(model: Model, options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of the prompts of each set."""
    sets = {"held-out modules": held_out_pieces(model, options.count)}
    sets["asked again"] = [piece + piece[:AGAIN] for piece in held_out_pieces(model, options.count, PIECE)]
    for flag in options.prompts:
        name, _, file = flag.partition("=")
        sets[name] = [model.encode(text)[-LONGEST:] for text in read_prompt_file(Path(file))[: options.count]]
    return sets


def generated(model: Model, sets: dict[str, list[list[int]]]) -> Iterator[dict[str, Any]]:
    """Replay every tree along the target's own text."""
    for name, prompts in tqdm(sets.items(), unit="set"):
        for temperature in (0.0, 1.0):
            result = model.generate(
                prompts, tree=None, max_new_tokens=NEW, temperature=temperature, ignore_eos=True, seed=1
            )
            texts = [[*p, *r.token_ids] for p, r in zip(prompts, result.prompts, strict=True)]
            about = {"texts": name, "count": len(prompts), "temperature": temperature}
            yield from (about | row for row in replays(texts, [len(p) for p in prompts]))


def given(model: Model, count: int) -> Iterator[dict[str, Any]]:
    """Replay every tree along given texts."""
    pieces = held_out_pieces(model, count, PIECE)
    edited = [model.encode(str(model.decode(piece)).replace("self", "this")) for piece in pieces]
    edits = [piece + edit for piece, edit in zip(pieces, edited, strict=True)]
    for name, texts, prompt in (("modules, given", pieces, PIECE // 3), ("edits, given", edits, PIECE)):
        about = {"texts": name, "count": count, "temperature": None}
        yield from (about | row for row in replays(texts, [prompt] * count))


def replays(texts: Sequence[Sequence[int]], prompts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Replay the rounds of every tree along texts, each from the token after its prompt."""
    slots = max(map(len, texts))
    tokens = jnp.asarray([[*text, *[0] * (slots - len(text))] for text in texts], jnp.int32)
    for tree in TREES:
        gains = np.asarray(_gains(tree, tokens, jnp.asarray([len(text) for text in texts], jnp.int32)))
        rounds, gained = 0, 0
        for row, text, prompt in zip(gains, texts, prompts, strict=True):
            length = prompt + 1
            while length < len(text):
                rounds, gained, length = rounds + 1, gained + int(row[length]), length + int(row[length])
        yield {"tree": tree.name, "rounds": rounds, "accept_length": round(gained / rounds, 3)}


@partial(jax.jit, static_argnums=0)
def _gains(tree: TreeConfig, tokens: jax.Array, limits: jax.Array) -> jax.Array:
    """Tokens that a round gains `[texts, lengths]`, by the number of tokens before it."""
    lengths = jnp.arange(tokens.shape[1], dtype=jnp.int32)

    def gain(text: jax.Array, limit: jax.Array, length: jax.Array) -> jax.Array:
        drafted = draft_continuations(tree, NgramDrafter.longest, text, jnp.maximum(length, 1))
        return take_path(tree.longest_path, drafted, text, length, limit).count

    return jax.lax.map(lambda row: jax.vmap(partial(gain, *row))(lengths), (tokens, limits))


def own_agreement(model: Model, count: int) -> Iterator[dict[str, Any]]:
    """Measure how often the embedded target agrees with itself at K experts a token."""
    yield from agreement("embedded, held-out modules", model, held_out_pieces(model, count))


def random_agreement() -> Iterator[dict[str, Any]]:
    """Measure how often a random target of each family agrees with itself at K experts a token."""
    for name, model, prompts in random_targets():
        yield from agreement(name, model, prompts)


def random_targets() -> Iterator[tuple[str, Model, list[list[int]]]]:
    """Make a random target of each family: its name, the model, and prompts for it."""
    prompts = np.random.default_rng(0).integers(0, _SHAPE["vocab_size"], (16, 32)).tolist()
    for family, fields in FAMILIES.items():
        config = read_config(_SHAPE | fields | {"model_type": family})
        params = random_decoder(config, BACKENDS["switch"], jax.random.key(0), "float32")
        model = Model(config, params, BACKENDS["switch"], jnp.dtype("float32"), None, (), Path(f"random {family}"))
        yield f"random, {family}", model, prompts


def agreement(target: str, model: Model, prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    """Share of rounds that accept the one token that a target with K experts drafts, for K below its own number."""
    most = model.config.num_experts_per_tok
    for experts in range(1, most):
        drafting = dataclasses.replace(model, draft=named_draft(f"self:{experts}", model.config))
        result = drafting.generate(prompts, tree=PAIR, max_new_tokens=NEW, ignore_eos=True)
        share = summary(PAIR, result)["accepted_by_depth"][0]
        yield {"target": target, "experts": experts, "of": most, "agreement": share}


def ngram_times() -> dict[str, dict[str, float]]:
    """Least microseconds of drafting one tree, by tree and length of the buffer: other work only adds to them."""
    found: dict[str, dict[str, float]] = {}
    for tree in TREES:
        for slots in BUFFERS:
            tokens = jnp.asarray(np.random.default_rng(0).integers(0, 512, slots), jnp.int32)
            program, length = jax.jit(partial(draft_continuations, tree, NgramDrafter.longest)), jnp.int32(slots - 64)
            seconds = []
            for _ in range(400):
                started = time.perf_counter()
                jax.block_until_ready(program(tokens, length))
                seconds.append(time.perf_counter() - started)
            found.setdefault(tree.name, {})[str(slots)] = round(min(seconds) * 1e6, 1)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
