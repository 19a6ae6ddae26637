"""What a budget does to the embedded target's distribution, by rule and size of the budget:

    python -m benchmarks.budget_quality --out benchmarks/results

Texts are pieces of held-out modules, and the target's own greedy continuations of their beginnings. Each is followed
token by token: the head drafts a tree, the target verifies it under the budget, and of the tree that path is committed
which the text takes, with the rows of keys and values that the budget left. So errors pile up in the cache as they do
in use, and every logit has the exact target's to be compared with, of the same text: one plain pass without a budget.
Figures are means over positions, and intervals 95 % of a bootstrap over texts. Every text is a batch of its own to the
budget.

`accept_length` counts tokens a round gains: on held-out text that is how well the head guesses the text, on the
target's own how much greedy decoding would accept. Under a faithful rule it is lower: what is given up is not
committed.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from benchmarks.acceptance import held_out_prompts
from moespec_jax.accept import Accepted, cut_path
from moespec_jax.attention import causal_mask
from moespec_jax.budget import Nodes, Restricted, restrict_to
from moespec_jax.budget_config import BudgetConfig, resolve
from moespec_jax.cache import empty_cache, keep_rows
from moespec_jax.command import use_compilation_cache
from moespec_jax.config import TreeConfig
from moespec_jax.decode import append_path, experts_read
from moespec_jax.decoder import Decoder, ForwardInfo, forward, unembed
from moespec_jax.model import Model, load
from moespec_jax.results import versions
from moespec_jax.routing import Routing
from moespec_jax.run import Batch, Run
from moespec_jax.sample import SamplingConfig
from moespec_jax.speculate import SpeculationSettings, SpeculationState, Speculator, draft_trees, verify_trees
from moespec_jax.tree import Tree

PROMPT, TREE = 64, TreeConfig(7, 10, 60)
PAPER = dict(score="probability", credit="all")
WHOLE: dict[str, Any] = dict(coverage="guarantee", guarantee=0.0)
RULES: dict[str, dict[str, Any]] = {
    "MoE-Spec (probability, all)": PAPER,
    "MoE-Spec, truncate": PAPER | dict(coverage="truncate"),
    "probability, hits": dict(score="probability", credit="hits"),
    "path, all": dict(score="path", credit="all"),
    "path, hits": dict(score="path", credit="hits"),
    "path, hits, anchor root": dict(score="path", credit="hits", anchor="root"),
    "depth, hits, anchor root (AcceptMoE)": dict(score="depth", credit="hits", anchor="root"),
    "path, hits, guarantee 0.5 (OEA)": dict(score="path", credit="hits", coverage="guarantee"),
    "path, squares (default)": {},
    "path, squares, truncate": dict(coverage="truncate"),
    "path, squares, faithfulness 0.3": dict(anchor="root", faithfulness=0.3),
    "path, squares, faithfulness 0.5": dict(anchor="root", faithfulness=0.5),
    "path, squares, guarantee 0, faithfulness 0.5": WHOLE | dict(faithfulness=0.5),
    "path, squares, guarantee 0, faithfulness 1 (exact)": WHOLE | dict(faithfulness=1.0),
}
# Of these, the ones that are followed through the target's own text too.
OWN = [name for name in RULES if name.startswith(("MoE-Spec (", "path, hits", "path, squares"))]
# Sizes that follow the text: the budget is their most.
SIZED: dict[str, dict[str, Any]] = {
    "MoE-Spec, mass 0.6": PAPER | dict(size="mass", mass=0.6),
    "path, squares, mass 0.9": dict(size="mass", mass=0.9),
    "path, squares, rank": dict(size="rank"),
}


class Followed(NamedTuple):
    """Texts on their way: the state, what was measured at each position, and sums of experts read, gains and rounds."""

    state: SpeculationState
    kl: Float[Array, "texts positions"]
    same: Float[Array, "texts positions"]
    read: Float[Array, " texts"]
    gained: Float[Array, " texts"]
    rounds: Float[Array, " texts"]


def main() -> int:
    """Measure every rule at every budget on both kinds of text, and write `budget_quality.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write budget_quality.json to (default: print)")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=112, help="followed in each text, after its prompt of 64")
    parser.add_argument("--budgets", nargs="+", type=int, default=[6, 8, 12, 16])
    parser.add_argument("--rules", nargs="+", choices=[*RULES, *SIZED], default=[*RULES, *SIZED], metavar="RULE")
    options = parser.parse_args()
    use_compilation_cache(None)
    model = load(dtype="float32")
    report: dict[str, Any] = {
        "texts": options.texts, "tokens": options.tokens, "tree": dataclasses.asdict(TREE),
        "num_experts": model.config.num_experts, "num_experts_per_tok": model.config.num_experts_per_tok,
        "dtype": "float32", "device": jax.devices()[0].platform, "versions": versions(), "rows": [],
    }  # fmt: skip
    for kind, texts in (("held-out", held_out(model, options)), ("own", continued(model, options))):
        study = Study(model, texts)
        report["rows"].append({"text": kind, "rule": "exact", "budget": None, **study.measure(None, None)})
        for rule in tqdm([r for r in options.rules if kind == "held-out" or r in OWN], desc=kind, unit="rule"):
            budgets = options.budgets if rule in RULES else [model.config.num_experts]
            for budget in budgets:
                config = BudgetConfig(model.config.num_experts, **(RULES | SIZED)[rule])
                report["rows"].append({"text": kind, "rule": rule, "budget": budget, **study.measure(config, budget)})
                print(json.dumps(report["rows"][-1]), file=sys.stderr)
    report["equal_quality"] = equal_quality(report["rows"])
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "budget_quality.json").write_text(text)
    return 0


def equal_quality(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What budget gives every rule the divergence of MoE-Spec's own, by interpolation between the logarithms of the
    measured ones, with 95 % of a bootstrap over texts; no rule is credited with less than the smallest measured."""
    paper, found = next(iter(RULES)), []
    for text in dict.fromkeys(row["text"] for row in rows):
        by_rule: dict[str, dict[int, np.ndarray]] = {}
        for row in rows:
            if row["text"] == text and row["rule"] in RULES:
                by_rule.setdefault(row["rule"], {})[row["budget"]] = np.array(row["kl_by_text"])
        for rule, own in by_rule.items():
            for budget, theirs in by_rule.get(paper, {}).items():
                draws = np.random.default_rng(0).integers(0, len(theirs), (2000, len(theirs)))
                matched = [_match(own, draw, theirs[draw].mean()) for draw in [np.arange(len(theirs)), *draws]]
                low, high = np.quantile(matched[1:], [0.025, 0.975], method="nearest").tolist()
                entry = {"text": text, "rule": rule, "paper_budget": budget, "budget": _known(matched[0])}
                found.append(entry | {"budget_95": [_known(low), _known(high)]})
    return found


def _known(budget: float) -> float | None:
    return round(budget, 2) if np.isfinite(budget) else None


def _match(own: dict[int, np.ndarray], draw: np.ndarray, target: float) -> float:
    """The budget at which a rule's mean over the drawn texts falls to `target`; infinite if it does not."""
    budgets = sorted(own)
    logs = [float(np.log(max(own[b][draw].mean(), 1e-9))) for b in budgets]
    for i, (budget, log) in enumerate(zip(budgets, logs, strict=True)):
        if log <= np.log(target):
            if i == 0:
                return float(budget)
            share = (logs[i - 1] - np.log(target)) / (logs[i - 1] - log)
            return budgets[i - 1] + float(share) * (budget - budgets[i - 1])
    return float("inf")


def held_out(model: Model, options: argparse.Namespace) -> np.ndarray:
    """Evenly spaced pieces of the held-out modules."""
    return np.array(held_out_prompts(model, options.texts, PROMPT + options.tokens + 1), np.int32)


def continued(model: Model, options: argparse.Namespace) -> np.ndarray:
    """What the target itself would write, greedily."""
    prompts = held_out_prompts(model, options.texts, PROMPT)
    result = model.generate(prompts, tree=None, max_new_tokens=options.tokens + 1, ignore_eos=True)
    return np.array([p + r.token_ids for p, r in zip(prompts, result.prompts, strict=True)], np.int32)


class Study:
    """Some texts, their exact log-probabilities, and the state in which all are followed from."""

    def __init__(self, model: Model, texts: np.ndarray):
        self.model, self.texts = model, jnp.asarray(texts)
        method = model.method(SamplingConfig(), TREE)
        assert isinstance(method.settings, SpeculationSettings)
        self.settings, self.params = method.settings, method.params
        self.exact = jax.jit(partial(log_probabilities, self.settings))(model.params, self.texts)
        count, length = texts.shape
        prompts = [row[:PROMPT].tolist() for row in texts]
        state = Run(model.programs, method, Batch(prompts, [length - 1] * count, (), 0)).state_after(0)
        tokens = state.decoding.tokens.at[:, :length].set(self.texts)
        start = jnp.full((count,), PROMPT + 1, jnp.int32)
        decoding = dataclasses.replace(state.decoding, tokens=tokens, length=start, done=start < 0)
        self.state = dataclasses.replace(state, decoding=decoding)
        self._compiled = cache(self._compile)

    def measure(self, rule: BudgetConfig | None, budget: int | None) -> dict[str, Any]:
        """Figures of one rule under one budget; without a rule, exactly."""
        resolved = None if rule is None else resolve(rule, self.model.config)
        bound = jnp.int32(self.model.config.num_experts if budget is None else budget)
        done: Followed = self._compiled(resolved)(self.params, self.state, self.exact, self.texts, bound)
        kl, same = (np.nanmean(np.asarray(values), axis=1) for values in (done.kl, done.same))
        draws = np.random.default_rng(0).integers(0, len(kl), (2000, len(kl)))
        rounds = float(done.rounds.sum())
        return {
            "kl": round(float(kl.mean()), 6),
            "kl_95": np.percentile(kl[draws].mean(axis=1), [2.5, 97.5]).round(6).tolist(),
            "top1": round(float(same.mean()), 5),
            "top1_95": np.percentile(same[draws].mean(axis=1), [2.5, 97.5]).round(5).tolist(),
            "accept_length": round(float(done.gained.sum()) / rounds, 3),
            "experts_read": round(float(done.read.sum()) / rounds, 2),
            "kl_by_text": kl.round(6).tolist(),
        }

    def _compile(self, rule: BudgetConfig | None) -> Callable[..., Followed]:
        return jax.jit(partial(follow, self.settings._replace(budget=rule)))


def follow(
    settings: SpeculationSettings,
    params: Speculator,
    state: SpeculationState,
    exact: Float[Array, "texts positions vocab"],
    texts: Int[Array, "texts tokens"],
    bound: Int[Array, ""],
) -> Followed:
    """Every text to its end, under at most `bound` experts a layer and text."""
    settings = settings._replace(restrict=partial(restrict_each, bound))
    unknown, zero = jnp.full(exact.shape[:2], jnp.nan), jnp.zeros(len(texts))

    def step(done: Followed) -> Followed:
        trees, draft_cache = draft_trees(settings, params, done.state)
        decoding = done.state.decoding
        logits, kv, info = verify_trees(settings, params.target, done.state, trees)
        accepted = jax.vmap(take_path)(trees, texts, decoding.length)
        if settings.budget is not None and settings.budget.gives_up:
            live = info.routers[-1].restricted.live.reshape(trees.tokens.shape)  # pyright: ignore[reportOptionalMemberAccess]
            accepted = jax.vmap(cut_path)(trees, accepted, live)
        kl, same = jax.vmap(compare)(done.kl, done.same, logits, accepted, exact, decoding.length - 1)
        active = (~decoding.done).astype(jnp.float32)
        kv = keep_rows(kv, decoding.length - 1, accepted.path, settings.tree.size)
        taps = jnp.take_along_axis(info.taps, accepted.path[:, :, None], axis=1)  # pyright: ignore[reportArgumentType]
        decoding = append_path(dataclasses.replace(decoding, cache=kv), trees, accepted)
        depth = jnp.arange(settings.tree.longest_path, dtype=jnp.int32)[None, :]
        reached = done.state.reached + jnp.sum((depth < accepted.count[:, None]) * active[:, None], axis=0)
        state = SpeculationState(decoding, draft_cache, taps, reached)
        return Followed(
            state,
            jnp.where(active[:, None] > 0, kl, done.kl),
            jnp.where(active[:, None] > 0, same, done.same),
            done.read + active * reads(settings, info, len(texts)),
            done.gained + active * accepted.count,
            done.rounds + active,
        )

    start = Followed(state, unknown, unknown, zero, zero, zero)
    return jax.lax.while_loop(lambda done: ~jnp.all(done.state.decoding.done), step, start)


def restrict_each(
    bound: Int[Array, ""], rule: BudgetConfig, nodes: Nodes, norm_topk_prob: bool, layer: int | Array,
    probabilities: Array, natural: Routing, valid: Array,
) -> Restricted:  # fmt: skip
    """As `budget.restrict`, with every sequence's tree to itself: what each would get as a batch of one. Of
    shortlists the first tree's is told."""
    trees, size = nodes.depth.shape

    def one(nodes: Nodes, probabilities: Array, natural: Routing, valid: Array) -> Restricted:
        alone = jax.tree.map(lambda leaf: leaf[None], nodes)._replace(committed=nodes.committed)
        return restrict_to(rule, alone, norm_topk_prob, bound, probabilities, natural, valid)

    split = partial(jax.tree.map, lambda leaf: leaf.reshape(trees, size, *leaf.shape[1:]))
    axes = (Nodes(0, 0, 0, None), 0, 0, 0)  # pyright: ignore[reportArgumentType]
    found: Restricted = jax.vmap(one, axes)(nodes, split(probabilities), split(natural), split(valid))
    joined = jax.tree.map(lambda leaf: leaf.reshape(trees * size, *leaf.shape[2:]), found.routing)
    routing = dataclasses.replace(joined, max_distinct=None)
    replaced, live = found.replaced.reshape(-1), found.live.reshape(-1)
    return Restricted(routing, found.shortlist[0], jnp.mean(found.mass_kept), replaced, live)


def take_path(tree: Tree, text: Int[Array, " tokens"], index: Int[Array, ""]) -> Accepted:
    """The nodes that the text takes from position `index` on, and the token after them."""

    def step(carry: tuple[Array, Array], level: Array) -> tuple[tuple[Array, Array], Array]:
        node, count = carry
        child = (tree.parents == node) & (tree.tokens == text[index + level]) & (count == level + 1)
        found = jnp.any(child)
        node = jnp.where(found, jnp.argmax(child).astype(jnp.int32), node)
        return (node, count + found.astype(jnp.int32)), node

    levels = jnp.arange(TREE.longest_path - 1, dtype=jnp.int32)
    (_, count), path = jax.lax.scan(step, (jnp.int32(0), jnp.int32(1)), levels)
    return Accepted(jnp.concatenate([jnp.zeros((1,), jnp.int32), path]), count, text[index + count - 1])


def compare(
    kl: Array, same: Array, logits: Array, accepted: Accepted, exact: Array, start: Array
) -> tuple[Array, Array]:
    """Kullback-Leibler divergence of the committed rows' distributions from the exact ones, and whether the first
    choice is the same, put at their positions."""
    step = jnp.arange(accepted.path.shape[0], dtype=jnp.int32)
    budgeted = jax.nn.log_softmax(logits[accepted.path], axis=-1)
    own = exact[jnp.minimum(start + step, exact.shape[0] - 1)]
    where = jnp.where(step < accepted.count, start + step, exact.shape[0])
    divergence = jnp.sum(jnp.exp(own) * (own - budgeted), axis=-1)
    first = (jnp.argmax(own, axis=-1) == jnp.argmax(budgeted, axis=-1)).astype(jnp.float32)
    return kl.at[where].set(divergence, mode="drop"), same.at[where].set(first, mode="drop")


def reads(settings: SpeculationSettings, info: ForwardInfo, texts: int) -> Float[Array, " texts"]:
    """Distinct experts that each text's rows went to, averaged over layers."""
    hit = experts_read(settings.target.config, info, texts)
    return jnp.mean(jnp.sum(hit, axis=2, dtype=jnp.float32), axis=0)


def log_probabilities(settings: SpeculationSettings, params: Decoder, texts: Array) -> Array:
    """The exact target's, of every next token of a text but the last."""
    ids = texts[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :], ids.shape)
    config = settings.target.config
    kv = empty_cache(config, ids.shape[0], ids.shape[1], jnp.float32, stacked=params.stacked)
    mask = causal_mask(positions, ids.shape[1])
    hidden, _, _ = forward(config, params, ids, positions, mask, kv, settings.target.compute)
    return jax.nn.log_softmax(unembed(params, hidden), axis=-1)


if __name__ == "__main__":
    sys.exit(main())
