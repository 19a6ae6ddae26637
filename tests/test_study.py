"""A study's figures against recounts in plain Python, and its files against being cut off."""

import csv
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from budget_oracle import Rows, restrict
from speculation import FastPrograms
from tiny import CONFIG, tiny_tensors
from tiny_pair import write_pair

import moespec_jax.study.__main__ as study
from moespec_jax.config import RouterConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.measure.fidelity import Texts
from moespec_jax.measure.ledger import Ledger
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.study.coactivation import count_pairs, lift, order
from moespec_jax.study.demand import kept_mass, least_budget, uniform_union, unions
from moespec_jax.study.finding import contrast, standing, standing_sentence
from moespec_jax.study.reconstruction import loss, outputs
from moespec_jax.study.routing import TreeRouting, observed_rounds, text_experts, tree_routing
from moespec_jax.study.rules import PAPER, RULES

EXPERTS, ACTIVE, LAYERS = 8, 2, 3
CHANGES = dict(num_experts=EXPERTS, num_experts_per_tok=ACTIVE)
TREE = TreeConfig(2, 4, 20)
PROMPTS = [[5, 17, 9, 30], [61, 4], [100, 7, 8, 90, 12, 40]]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`--model` and `--draft-model` of a tiny pair."""
    return write_pair(tmp_path_factory.mktemp("pair"), 1, **CHANGES)[:4]


@pytest.fixture(scope="module")
def model(flags: list[str]) -> Model:
    programs: Any = FastPrograms()
    return dataclasses.replace(load(flags[1], flags[3]), programs=programs)


@pytest.fixture(scope="module")
def seen(model: Model) -> TreeRouting:
    """The trees of the second round."""
    return list(observed_rounds(model, TREE, PROMPTS, 2))[1]


@pytest.mark.slow
def test_prefixes_by_score_are_the_smaller_trees(model: Model) -> None:
    whole = unions(tree_routing(model, TREE, PROMPTS, rounds=1))
    assert whole.shape == (LAYERS, len(PROMPTS), TREE.size)
    for size in (3, 11):
        drafted = tree_routing(model, TreeConfig(TREE.depth, TREE.top_k, size), PROMPTS, rounds=1)
        for layer, text in itertools.product(range(LAYERS), range(len(PROMPTS))):
            assert whole[layer, text, size - 1] == len(set(drafted.experts[layer, text].ravel().tolist()))
    assert len(np.unique(whole[:, :, -1])) > 1


def test_choice_by_lot_is_what_all_choices_average_to() -> None:
    every = list(itertools.combinations(range(4), 2))
    for nodes in (1, 2, 3):
        counts = [len(set().union(*choice)) for choice in itertools.product(every, repeat=nodes)]
        assert uniform_union(4, 2, np.array([nodes]))[0] == pytest.approx(np.mean(counts))


def test_kept_mass_is_what_the_heaviest_experts_hold(seen: TreeRouting) -> None:
    mass = kept_mass(seen)
    for layer, tree, budget in itertools.product(range(LAYERS), range(len(PROMPTS)), (1, 3, EXPERTS)):
        sums = [sum(float(row[e]) for row in seen.probabilities[layer, tree]) for e in range(EXPERTS)]
        held = max(sum(sums[e] for e in some) for some in itertools.combinations(range(EXPERTS), budget))
        assert mass[layer, tree, budget - 1] == pytest.approx(held / sum(sums))
        assert (mass[layer, tree, least_budget(mass, 0.6)[layer, tree] - 1]) >= 0.6
        assert (mass[layer, tree] < 0.6).sum() == least_budget(mass, 0.6)[layer, tree] - 1


@pytest.mark.slow
def test_committed_nodes_are_the_text_and_chose_what_its_tokens_choose(model: Model) -> None:
    """Exact verification of a tree routes as one plain pass over the text does."""
    rounds = tree_routing(model, TREE, PROMPTS, rounds=3)
    for number, prompt in enumerate(PROMPTS):
        own = rounds.text == number
        experts = rounds.experts[:, own][:, rounds.committed[own]]  # rounds in turn, parents before children
        count = experts.shape[1]
        new = model.generate([prompt], tree=None, max_new_tokens=count + 1, ignore_eos=True).prompts[0].token_ids
        plain = text_experts(model, [prompt + new])[:, len(prompt) : len(prompt) + count]
        assert count >= 3
        np.testing.assert_array_equal(np.sort(experts, axis=-1), np.sort(plain, axis=-1))


def test_all_experts_lose_nothing(model: Model, seen: TreeRouting) -> None:
    for name in (PAPER, "path, squares, guarantee 0, faithfulness 1 (exact)"):
        found = loss(model, seen, BudgetConfig(EXPERTS, **RULES[name]), EXPERTS)
        assert (found.errors == 0).all() and (found.outputs > 0).all() and (found.given_up == 0).all()


@pytest.mark.parametrize("name", [PAPER, "MoE-Spec, truncate", "path, squares, faithfulness 0.5"])
def test_reconstruction_error_is_what_numpy_says(model: Model, seen: TreeRouting, name: str) -> None:
    budget, tensors = 3, tiny_tensors(CONFIG | CHANGES | dict(num_hidden_layers=LAYERS))
    found = loss(model, seen, BudgetConfig(EXPERTS, **RULES[name]), budget)
    for layer in range(LAYERS):
        expected = [by_numpy(tensors, seen, layer, tree, budget, RULES[name]) for tree in range(len(PROMPTS))]
        errors, outputs, given_up = (sum(part) for part in zip(*expected, strict=True))
        np.testing.assert_allclose(found.errors[layer], errors, rtol=1e-4)  # sums of float32 products
        np.testing.assert_allclose(found.outputs[layer], outputs, rtol=1e-4)
        assert found.given_up[layer] == given_up
    assert (found.errors[:, 0] > 0).all()


def test_weights_scale_the_inputs_of_experts_where_the_router_does_so(model: Model, seen: TreeRouting) -> None:
    config = dataclasses.replace(model.config, router=RouterConfig(scales_input=True))
    found = np.asarray(outputs(dataclasses.replace(model, config=config), seen)).reshape(*seen.inputs.shape)
    tensors = tiny_tensors(CONFIG | CHANGES | dict(num_hidden_layers=LAYERS))
    for layer, node in itertools.product(range(LAYERS), range(4)):
        row = seen.inputs[layer, 0, node].astype(np.float64)
        shares = seen.probabilities[layer, 0, node].astype(np.float64)
        chosen = np.argsort(-shares)[:ACTIVE]
        weights = shares[chosen] / shares[chosen].sum()
        expected = sum(output(tensors, layer, w * row, {int(e): 1.0}) for e, w in zip(chosen, weights, strict=True))
        np.testing.assert_allclose(found[layer, 0, node], expected, atol=1e-5)


@pytest.mark.slow
def test_stacked_layers_route_and_lose_the_same(flags: list[str], model: Model, seen: TreeRouting) -> None:
    rule, programs = BudgetConfig(EXPERTS, **RULES[PAPER]), model.programs
    stacked = dataclasses.replace(load(flags[1], flags[3], backend=BACKENDS["slots"]), programs=programs)
    again = list(observed_rounds(stacked, TREE, PROMPTS, 2))[1]
    np.testing.assert_array_equal(again.parents, seen.parents)
    np.testing.assert_array_equal(again.experts, seen.experts)
    for one, other in zip(loss(stacked, seen, rule, 3), loss(model, seen, rule, 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)  # another order of sums


def by_numpy(
    tensors: dict[str, np.ndarray], seen: TreeRouting, layer: int, tree: int, budget: int, rule: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Squared errors and outputs of one tree, of all rows that stay and of those committed; how many do not stay."""
    parents, size = seen.parents[tree].tolist(), TREE.size
    above: list[list[int]] = []
    for node in range(size):
        above.append([node] if parents[node] < 0 else [*above[parents[node]], node])
    depth = [len(path) - 1 for path in above]
    rows = Rows(
        [True] * size, np.exp(seen.scores[tree]).tolist(), depth, above, [depth.count(d) for d in depth],
        seen.acceptance_by_depth[tree].tolist(),
    )  # fmt: skip
    logits, x = np.log(seen.probabilities[layer, tree].astype(np.float64)), seen.inputs[layer, tree].astype(np.float64)
    free, outcome = (
        restrict(BudgetConfig(bound, **r), bound, logits, ACTIVE, True, rows)
        for bound, r in ((EXPERTS, {}), (budget, rule))
    )
    y, budgeted = (
        np.stack([output(tensors, layer, row, w) for row, w in zip(x, out.weights, strict=True)])
        for out in (free, outcome)
    )
    kept = np.array(outcome.live)
    kinds = np.stack([kept, kept & seen.committed[tree]])
    return kinds @ ((budgeted - y) ** 2).sum(axis=1), kinds @ (y**2).sum(axis=1), size - int(kept.sum())


def output(tensors: dict[str, np.ndarray], layer: int, row: np.ndarray, weights: dict[int, float]) -> np.ndarray:
    def expert(e: int) -> np.ndarray:
        names = (f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for part in ("gate", "up", "down"))
        return oracles.gated_mlp(row[None], *(tensors[name].astype(np.float64).T for name in names), "silu")[0]

    return sum((w * expert(e) for e, w in weights.items()), np.zeros_like(row))


def test_pairs_are_counted_and_compared_with_chance() -> None:
    random = np.random.default_rng(0)
    experts = np.stack([random.permutation(6)[:3] for _ in range(50)])
    pairs = count_pairs(experts, 6)
    tokens = [set(row.tolist()) for row in experts]
    for a, b in itertools.product(range(6), repeat=2):
        assert pairs[a, b] == sum(a in token and b in token for token in tokens)
    lifted = lift(pairs)
    share = {e: sum(e in token for token in tokens) for e in range(6)}
    every = sum(share[a] * share[b] for a in range(6) for b in range(6) if a != b)
    chance = 50 * 3 * 2 * share[1] * share[4] / every
    assert lifted[1, 4] == pytest.approx(pairs[1, 4] / chance) and np.isnan(lifted[2, 2])


def test_experts_that_go_together_come_to_lie_together() -> None:
    """Two halves that never mix, shuffled: the order brings each half together."""
    random = np.random.default_rng(1)
    half = {e: int(place < 4) for place, e in enumerate(random.permutation(8).tolist())}
    groups = [[e for e in half if half[e] == side] for side in (0, 1)]
    experts = np.stack([random.permutation(groups[i % 2])[:2] for i in range(400)])
    sides = [half[e] for e in order(lift(count_pairs(experts, 8))).tolist()]
    assert sides in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


def test_contrasts_are_paired() -> None:
    """Whatever texts have in common does not widen an interval."""
    random = np.random.default_rng(2)
    hard = [random.exponential(size=9), random.exponential(size=4) + 3]
    found = contrast(hard, [values + 0.25 for values in hard])
    assert found.difference == pytest.approx(0.25) and found.difference_95 == pytest.approx((0.25, 0.25))
    assert found.kl == pytest.approx(np.mean([hard[0].mean(), hard[1].mean()])) and found.significant
    assert not contrast(hard, hard).significant and contrast(hard, hard).times == 1.0
    doubled = contrast(hard, [2 * values for values in hard])
    assert doubled.times_95 == pytest.approx((2.0, 2.0)) and doubled.texts == 13


def test_the_least_divergence_stands_first_and_says_how_sure_that_is() -> None:
    noise = np.random.default_rng(3).normal(scale=0.1, size=30)
    by_rule = {PAPER: [np.full(30, 0.8)], "a": [np.full(30, 0.4)], "b": [0.4 + 0.001 + noise - noise.mean()]}
    found = standing(by_rule, PAPER, list(by_rule))
    assert (found.best, found.runner_up) == ("a", "b")
    said = standing_sentence(found, PAPER)
    assert "“a” is best" in said and "diverges 2.0 times as much" in said and "do not distinguish" in said


@pytest.mark.slow
def test_texts_forced_in_parts_are_the_same(model: Model) -> None:
    texts = [[*prompt, *range(20, 30)] for prompt in PROMPTS]
    lengths = [len(prompt) for prompt in PROMPTS]
    rule = BudgetConfig(EXPERTS, **RULES[PAPER])
    whole, parts = (Texts(model, TREE, texts, lengths, batch).teacher_force(rule, 3) for batch in (None, 2))
    np.testing.assert_array_equal(np.isnan(whole.kl), np.isnan(parts.kl))
    np.testing.assert_allclose(whole.kl, parts.kl, atol=1e-5)  # rows side by side round differently
    np.testing.assert_array_equal(whole.rounds, parts.rounds)


class Killed(KeyboardInterrupt):
    """What a kill looks like from inside."""


@pytest.mark.slow
def test_cut_off_and_continued_it_writes_the_same_bytes(
    model: Model, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def add(a, b):\nthe cat\nnaïve\nsat on\n", encoding="utf-8")
    run = [
        *flags, "--prompts", f"tiny={prompts}", "--count", "4", "--tokens", "6", "--rounds", "2", "--batch", "2",
        "--tree-depth", "1", "--tree-top-k", "2", "--tree-size", "5", "--budgets", "3", "4", "--timed-budgets", "4",
        "--rules", "path, squares (default)", "--timed", "path, squares (default)", "--timed-tokens", "4",
        "--repeats", "1", "--timed-prompts", "1", "--compilation-cache", "none",
    ]  # fmt: skip
    monkeypatch.setattr(study, "load_requested", lambda arguments: model)
    assert study.main([*run, "--output", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr()
    assert "B = 4 of 8 experts" in printed.out and "is best" in printed.out and "lossy" in printed.out

    cut = tmp_path / "cut"
    fewer = [word for word in run if word != "3"]  # budgets may be added later
    for allowed, asked in ((1, run), (4, fewer), (3, run)):  # tasks before each kill: amid different kinds
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "put", killed_after(allowed))
            assert study.main([*asked, "--output", str(cut)]) == 130
    # What a clock said cannot come again: it is taken from the run that was not cut off.
    keep_turns(tmp_path / "whole" / "study.jsonl", cut / "study.jsonl")
    assert study.main([*run, "--output", str(cut)]) == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in cut.iterdir()) and "study.html" in names
    for name in set(names) - {"study.jsonl"}:
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    capsys.readouterr()
    check_files(cut, str(tmp_path))


def killed_after(allowed: int) -> Any:
    put, count = Ledger.put, itertools.count()

    def counted(ledger: Ledger, name: str, value: Any) -> Any:
        if next(count) >= allowed:
            raise Killed
        return put(ledger, name, value)

    return counted


def keep_turns(source: Path, ledger: Path) -> None:
    turns = [line for line in source.read_text().splitlines(keepends=True) if ": turn " in line]
    assert turns
    with ledger.open("a") as file:
        file.writelines(turns)


def check_files(directory: Path, machine: str) -> None:
    """Rows say what they are of and whether they are exact; the page needs no other file; no path is shown."""
    with (directory / "frontier.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["output"] for row in rows} == {"exact", "lossy"}
    assert all(row["device"].startswith("cpu") and row["dtype"] == "float32" and row["texts"] == "4" for row in rows)
    page = (directory / "study.html").read_text(encoding="utf-8")
    pictures = len(list(directory.glob("*.png")))
    assert page.count('src="data:image/png;base64,') == page.count("<img") == pictures > 5
    assert "http" not in page and machine not in page and "tiny=prompts.txt" in page


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rules", "none such"], "expected rules of few, all"),
        (["--rounds", "1"], "--rounds of at least 2"),
        (["--budgets", "1"], "expert budget from 2 to 8"),
        (["--tokens", "90"], "fit the model's context of 96"),
        (["--draft-model", "none"], "expected a draft head"),
    ],
)
def test_what_cannot_be_studied_is_refused_in_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat sat on the mat\n", encoding="utf-8")
    common = ["--prompts", f"tiny={prompts}", "--count", "1", "--output", str(tmp_path / "out")]
    assert study.main([*flags, *common, "--tokens", "4", "--timed-tokens", "4", *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "out").exists()
