"""The choice of shapes with costs of other devices: `python -m benchmarks.auto_replay --out benchmarks/results`.

SIMULATED: the texts and what is accepted of every draft are the embedded pair's, recorded here at every position of
plain decoding's texts (they do not depend on the shapes); the costs of rounds are those that were measured for
Qwen3-30B-A3B on an H200 and OLMoE-1B-7B on an H100. `decoding/choice.py` runs as it is, once for each text; beside it
every fixed setting, EVICT's and vLLM's rule, and the least time of any choice (`auto_rules.py`).

Sets of prompts: held-out modules, the target's own text (128 tokens of its own after a held-out piece), and any
`--prompts NAME=FILE`; at temperature 0 and 1.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.auto_rules import Drafts, Rule, Table, chosen, confidence_scheduled, evict, fixed, least
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.tree import Tree
from moespec_jax.measure.prompt_sets import HELD_OUT, continued, held_out_pieces, prompt_sets
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.tune.replay import ABSENT, drafts_along

CHAIN, SMALL, LARGE = TreeConfig(2, 1, 4), TreeConfig(4, 4, 16), TreeConfig(7, 10, 60)
TREES = (CHAIN, SMALL, LARGE)
LONGEST_PROMPT = 128
OWN = "the target's own text"
_H200 = "H200, Mosaic kernels, bf16, batch 1, jax 0.11.2, 2026-11-26"
_H100 = "H100, back-end fused, bf16, batch 1, jax 0.11.2, 2026-11-27 (benchmarks/results/gpu_h100.json)"
# Drafts alone: measured at 60/7/10 and 4/2/1 with OLMoE's head on the H100 (3.05 and 0.93 ms), 16/4/4 between them by
# its passes. The head of Qwen3-30B-A3B has the same width. OLMoE's rounds were measured after the choice of tokens had
# become faster, by 0.1 ms a level.
_DRAFTS = {CHAIN: 0.93, SMALL: 1.7, LARGE: 3.05}
_FASTER_DRAFTS = {CHAIN: 0.6, SMALL: 1.2, LARGE: 2.2}


def _table(name: str, source: str, plain: float, rounds: Sequence[float], drafts: dict[TreeConfig, float]) -> Table:
    return Table(name, source, plain, dict(zip(TREES, rounds, strict=True)), drafts)


TABLES = [
    _table("Qwen3-30B-A3B, H200, exact", _H200, 5.71, (9.48, 15.7, 24.2), _DRAFTS),
    _table("Qwen3-30B-A3B, H200, N/4", _H200, 5.71, (10.7, 11.9, 14.9), _DRAFTS),
    _table("Qwen3-30B-A3B, H200, N/8", _H200, 5.71, (8.87, 9.76, 12.5), _DRAFTS),
    _table("OLMoE-1B-7B, H100, exact", _H100, 1.368, (2.734, 4.286, 6.511), _FASTER_DRAFTS),
    _table("OLMoE-1B-7B, H100, N/8", _H100, 1.368, (1.963, 2.351, 3.338), _FASTER_DRAFTS),
]


def main() -> int:
    """Record, replay, and write `auto_replay.json`, or print it."""
    options = _options()
    recorded = _recorded(options)
    first = recorded[f"{HELD_OUT}, greedy"]
    rows = [row for table in TABLES for name, texts in recorded.items() for row in replay(table, name, texts, first)]
    report = {
        "simulated": True, "new_tokens": options.tokens, "texts": options.count, "trees": [t.name for t in TREES],
        "tables": [{"name": t.name, "source": t.source, "ms": t.costs} for t in TABLES], "rows": rows,
    }  # fmt: skip
    if options.out is None:
        print(json.dumps(report))
    else:
        (options.out / "auto_replay.json").write_text(json.dumps(report, indent=1) + "\n")
    _show(rows)
    return 0


def replay(table: Table, name: str, texts: Sequence[Sequence[Drafts]], measured: Sequence[Sequence[Drafts]]) -> Any:
    """One row for each rule: milliseconds a token, over plain decoding and over the best fixed setting of the set.

    The first text of `measured` gives the gains that a measurement of the costs would have found.
    """
    priors = [1.0, *(float(d.gained(t.size)[:24].mean()) for t, d in zip(table.trees, measured[0], strict=True))]
    rules: dict[str, Rule] = {"plain": partial(fixed, 0)}
    rules |= {tree.name: partial(fixed, 1 + i) for i, tree in enumerate(table.trees)}
    settings = list(rules)
    rules |= {
        "auto": partial(chosen, priors), "least": least, "EVICT 16/4/4": partial(evict, 1),
        "EVICT 60/7/10": partial(evict, 2), "vLLM 4/2/1": partial(confidence_scheduled, 0),
    }  # fmt: skip
    decoded = {rule: [decode(table, text) for text in texts] for rule, decode in rules.items()}
    ms = {rule: np.array([one.ms for one in own]) for rule, own in decoded.items()}
    best = min(settings, key=lambda rule: ms[rule].sum())
    by_text = np.min([ms[rule] for rule in settings], axis=0)
    tokens = len(texts[0][0].ranks)
    for rule, own in decoded.items():
        rounds: dict[str, int] = {}
        for one in own:
            rounds = {key: rounds.get(key, 0) + one.rounds.get(key, 0) for key in rounds | one.rounds}
        total = sum(rounds.values())
        yield {
            "table": table.name, "texts": name, "rule": rule, "ms_per_token": _number(ms[rule].mean() / tokens),
            "over_plain": _number(ms["plain"].sum() / ms[rule].sum()),
            "over_best_fixed": _number(ms[best].sum() / ms[rule].sum()), "best_fixed": best,
            "worst_text_over_plain": _number((ms["plain"] / ms[rule]).min()),
            "worst_text_over_its_best_fixed": _number((by_text / ms[rule]).min()),
            "share_of_rounds": {key: _number(count / total) for key, count in sorted(rounds.items()) if count},
        }  # fmt: skip


def record(model: Model, prompts: Sequence[Sequence[int]], tokens: int, sampling: SamplingConfig) -> list[list[Drafts]]:
    """Drafts of every tree at every position of the texts that follow the prompts."""
    longest = tokens + max(tree.longest_path for tree in TREES) + 1
    result = model.generate(
        prompts, tree=None, max_new_tokens=longest, temperature=sampling.temperature, ignore_eos=True
    )
    texts = [[*prompt, *one.token_ids] for prompt, one in zip(prompts, result.prompts, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    # Of one length, so that all sets share programs; what follows a position does not change it.
    texts = [text + [0] * (LONGEST_PROMPT + longest - len(text)) for text in texts]
    by_tree = []
    for tree in TREES:
        kept = drafts_along(model, texts, lengths, tree, tokens, partial(read_draft, tree), sampling)
        ranks, scores = (np.asarray(values) for values in kept)
        by_tree.append([Drafts(*one) for one in zip(ranks, scores, strict=True)])
    return [list(text) for text in zip(*by_tree, strict=True)]


def read_draft(config: TreeConfig, tree: Tree, text: Array, length: Array) -> tuple[Array, Array]:
    """Ranks of the nodes that a text takes, and all nodes' log-probabilities, best path first."""
    scores, tokens, parents = tree.scores[1:], tree.tokens[1:], tree.parents[1:]
    order = jnp.argsort(-scores, stable=True)
    rank = jnp.argsort(order).astype(jnp.int32)

    def step(node: Array, depth: Array) -> tuple[Array, Array]:
        child = (parents == node) & (tokens == text[length + depth])
        index = jnp.argmax(child).astype(jnp.int32)
        found = jnp.any(child)
        return jnp.where(found, index + 1, -2), jnp.where(found, rank[index], ABSENT)

    depths = jnp.arange(config.longest_path - 1, dtype=jnp.int32)
    return jax.lax.scan(step, jnp.int32(0), depths)[1], scores[order]


def _recorded(options: argparse.Namespace) -> dict[str, list[list[Drafts]]]:
    """Records of every set and temperature, those of the file given as they are."""
    recorded: dict[str, list[list[Drafts]]] = {}
    if options.records is not None and options.records.exists():
        recorded = pickle.loads(options.records.read_bytes())
    model = load(dtype="float32")
    sets = prompt_sets(model, options)
    sets[OWN] = [
        text[-LONGEST_PROMPT:] for text in continued(model, held_out_pieces(model, options.count), LONGEST_PROMPT)
    ]
    for name, prompts in sets.items():
        for how, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
            key = f"{name}, {how}"
            if key not in recorded:
                recorded[key] = record(model, prompts, options.tokens, SamplingConfig(temperature))
                print(f"recorded {key}", file=sys.stderr, flush=True)
            if options.records is not None:
                options.records.write_bytes(pickle.dumps(recorded))
    return recorded


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="directory to write auto_replay.json to (default: print)")
    parser.add_argument("--prompts", action="append", metavar="NAME=FILE", help="further sets (default: held-out)")
    parser.add_argument("--records", type=Path, help="file that keeps what was recorded, for further replays")
    parser.add_argument("--count", type=int, default=12, help="texts of each set")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each text")
    options = parser.parse_args()
    options.prompts, options.chat = ["held-out", *(options.prompts or [])], False
    options.longest_prompt = LONGEST_PROMPT
    return options


def _number(value: Any) -> float:
    return round(float(value), 4)


def _show(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if row["rule"] == "auto" or row["rule"].startswith(("EVICT", "vLLM", "least")):
            keys = ("over_plain", "over_best_fixed", "worst_text_over_plain", "worst_text_over_its_best_fixed")
            shown = " ".join(f"{row[key]:.3f}" for key in keys)
            print(
                f"{row['table'][:28]:28} {row['texts'][:28]:28} {row['rule']:14} {shown} {row['best_fixed']}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
