"""Texts scored directly and through verifying passes, and continued in every way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import cached_logits
from speculation import FastPrograms
from tiny_pair import write_pair

from moespec_jax.config import TreeConfig
from moespec_jax.decoding import autoregressive as decode
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.generation import continue_batch, cut_at
from moespec_jax.evaluate.loglikelihood import Scored, Text, score_batch
from moespec_jax.evaluate.specs import EvaluatedSpec, evaluated_spec
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model

pytestmark = pytest.mark.filterwarnings("ignore::moespec_jax.decoding.budget_config.BudgetWarning")

DENSE = Backend("dense", "flat", False, dense_experts)
TREES = {"chain": TreeConfig(2, 1, 4), "tree": TreeConfig(2, 3, 9)}
# So tight that it shows; and not anchored: a random head's drafts are seldom taken, and anchored roots lose nothing.
TIGHT = BudgetConfig((2, 3, 2), score="probability", credit="all")
PRUNING = BudgetConfig(3, score="probability", credit="all", min_kept_weight=0.6)
PLAIN = EvaluatedSpec("plain", DecodingSpec(), True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    argv = write_pair(tmp_path_factory.mktemp("pair"), 8, num_experts=8, max_position_embeddings=160)
    model = load(argv[1], argv[3], backend=DENSE)
    model.programs = FastPrograms()  # pyright: ignore[reportAttributeAccessIssue]
    yield model


def random_texts(seed: int = 0) -> list[Text]:
    """Of many lengths, with one token given and with all but one, with one candidate and with several."""
    rng = np.random.default_rng(seed)
    shapes = [(40, 1), (2, 1), (1, 1), (7, 7), (33, 32), (60, 20), (17, 3)]
    return [Text(ids(rng, length), given, ids(rng, 1 + given % 3)) for length, given in shapes]


def ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(1, 300, count).tolist()


def reference(model: Model, text: Text) -> Scored:
    """From one uncached forward pass over this text alone."""
    logits = cached_logits(model.config, model.params, DENSE, np.array([text.tokens], np.int32))[0]
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
    spots = range(text.given - 1, len(text.tokens) - 1)
    tokens = [(log_p[i, text.tokens[i + 1]], log_p[i].argmax() == text.tokens[i + 1]) for i in spots]
    return Scored(tokens, [(log_p[-1, c], log_p[-1].argmax() == c) for c in text.candidates])


def assert_same_scores(found: list[Scored], expected: list[Scored], tolerance: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        for a, b in zip((*one.tokens, *one.candidates), (*other.tokens, *other.candidates), strict=True):
            assert abs(a[0] - b[0]) < tolerance and a[1] == b[1]


@pytest.mark.slow
def test_direct_scores_are_the_forward_passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk or several, side by side with other texts, filled up to the batch."""
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 16)
    texts = random_texts()
    # The most probable tokens, so that `best` is not always false.
    texts.append(Text([5, *continue_batch(model, PLAIN, [[5]], 30)[0]], 1, [1]))
    found = score_batch(model, PLAIN, texts, 10)
    assert_same_scores(found, [reference(model, text) for text in texts])
    assert all(best for _, best in found[-1].tokens) and len(found[-1].tokens) == 30
    assert [len(s.tokens) for s in found] == [len(t.tokens) - t.given for t in texts]


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
def test_verified_scores_without_loss_are_the_forward_passes(model: Model, tree: str) -> None:
    texts = random_texts(1)
    exact = evaluated_spec(model, DecodingSpec(TREES[tree], BudgetConfig(8)))
    assert exact.exact
    assert_same_scores(score_batch(model, exact, texts, 8), [reference(model, text) for text in texts])


def unequal(one: list[Scored], other: list[Scored]) -> float:
    pairs = zip(one, other, strict=True)
    return max(
        abs(a[0] - b[0])
        for s, t in pairs
        for a, b in zip((*s.tokens, *s.candidates), (*t.tokens, *t.candidates), strict=True)
    )


@pytest.mark.slow
def test_scores_under_a_budget_are_each_texts_own(model: Model) -> None:
    """Whatever stands beside it; and they are not the model's."""
    texts, tight = random_texts(2), evaluated_spec(model, DecodingSpec(TREES["tree"], TIGHT))
    together = score_batch(model, tight, texts, 8)
    assert_same_scores([score_batch(model, tight, [text], 1)[0] for text in texts], together)
    assert not tight.exact and unequal(together, score_batch(model, PLAIN, texts, 8)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("budget", [TIGHT, PRUNING], ids=["tight", "pruning"])
def test_what_is_generated_under_a_budget_is_what_scores_best(model: Model, budget: BudgetConfig) -> None:
    """Generation and scoring are different programs; greedy decoding takes what scoring calls most probable."""
    spec, prompts = evaluated_spec(model, DecodingSpec(TREES["tree"], budget)), [[7, 9, 200], [31] * 20, [44, 3], [101]]
    new = continue_batch(model, spec, prompts, 24)
    texts = [Text([*p, *n[:-1]], len(p) + 1, n[-1:]) for p, n in zip(prompts, new, strict=True)]
    for scored, own in zip(score_batch(model, spec, texts, 4), new, strict=True):
        assert len(scored.tokens) == len(own) - 2
        assert all(best for _, best in (*scored.tokens, *scored.candidates))
    exact = score_batch(model, PLAIN, texts, 4)
    assert not all(best for scored in exact for _, best in (*scored.tokens, *scored.candidates))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, TIGHT], ids=["exact", "tight"])
def test_a_batch_continues_as_each_prompt_alone(model: Model, budget: BudgetConfig | None) -> None:
    prompts = [[7, 9, 200], [31] * 20, [44, 3]]
    tree = TREES["tree"]
    alone = [model.generate([p], max_new_tokens=20, tree=tree, budget=budget).prompts[0] for p in prompts]
    spec = evaluated_spec(model, DecodingSpec(tree, budget))
    assert continue_batch(model, spec, prompts, 20, size=4) == [one.token_ids for one in alone]
    if budget is None:
        assert continue_batch(model, PLAIN, prompts, 20, size=4) == [one.token_ids for one in alone]


def test_decoding_ends_when_all_have_said_enough(model: Model) -> None:
    whole = continue_batch(model, PLAIN, [[5], [6, 7]], 150)
    some = continue_batch(model, PLAIN, [[5], [6, 7]], 150, over=lambda i, new: len(new) >= 3 + i, size=3)
    assert [w[: len(s)] for w, s in zip(whole, some, strict=True)] == some
    assert 3 <= len(some[0]) and 4 <= len(some[1]) and len(some[0]) < len(whole[0])


@pytest.mark.slow
def test_number_of_programs_does_not_grow_with_the_texts(model: Model) -> None:
    counts: Any = model.programs
    tight, rng = evaluated_spec(model, DecodingSpec(TREES["tree"], TIGHT)), np.random.default_rng(3)
    for length in (17, 30):
        score_batch(model, tight, [Text(ids(rng, length), length - 1, [1])], 4)
    before = dict(counts.traces)
    for length in (17, 21, 29, 32):
        score_batch(model, tight, [Text(ids(rng, length), length - 1, [1, 2])] * 2, 4)
    assert counts.traces == before


def test_a_text_is_cut_at_the_first_of_its_ends() -> None:
    assert cut_at("a b c", ["c", "b"]) == "a " and cut_at("abc", ["x"]) == "abc" and cut_at("abc", []) == "abc"


@pytest.mark.parametrize(
    ("tree", "budget", "message"),
    [
        (None, BudgetConfig(4), "plain decoding"),
        (TREES["chain"], BudgetConfig(1), "from 2 to 8"),
        (TREES["chain"], BudgetConfig(4, groups=3), "groups to divide the 8 experts"),
    ],
)
def test_specs_that_the_model_cannot_decode_by(model: Model, tree: Any, budget: BudgetConfig, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        evaluated_spec(model, DecodingSpec(tree, budget))


def test_columns_name_tree_and_budget(model: Model, tmp_path: Path) -> None:
    about = evaluated_spec(model, DecodingSpec(TREES["chain"], TIGHT)).columns()
    assert about["way"] == "4/2/1, B = 2/3/2" and about["exact"] is False and about["budget"]["experts"] == (2, 3, 2)
    default = DecodingSpec("default")
    assert evaluated_spec(model, default).name == "4/2/1" and PLAIN == evaluated_spec(model, DecodingSpec())
    alone = load(str(model.directory), backend=DENSE)
    with pytest.raises(RequestError, match="draft head"):
        evaluated_spec(alone, DecodingSpec(TREES["chain"]))
    assert evaluated_spec(alone, default) == PLAIN
