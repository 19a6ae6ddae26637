"""The plug-in for lm-evaluation-harness: plain and exact speculation score alike, and scores are the model's own."""

import functools
import importlib.metadata
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from speculation import FastPrograms
from tiny_pair import write_pair

from moespec_jax.cli import arguments
from moespec_jax.errors import RequestError
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.runtime.load import load

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::moespec_jax.decoding.budget_config.BudgetWarning"),
    # What lm-eval and its dependencies warn of is not ours to fix.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DENSE = Backend("dense", "flat", False, dense_experts)
ROOT = Path(__file__).parent.parent
TASKS = ["python_choice", "python_line", "python_text"]
TREE, TIGHT = "8/2/3", {"expert_budget": "2/3/2", "budget_score": "probability", "budget_credit": "all"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    changes = dict(num_experts=8, max_position_embeddings=512)
    argv = write_pair(tmp_path_factory.mktemp("pair"), 8, **changes)
    directory = Path(argv[1])
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    words = {"eos_token": "<|end|>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))
    return {"pretrained": argv[1], "draft_model": argv[3]}


@pytest.fixture(scope="module")
def harness(pair: dict[str, str]) -> Iterator[Any]:
    """Makes a model of lm-eval from its arguments; all share their compiled programs, which are compiled quickly."""
    from moespec_jax.evaluate.harness import MoespecLM

    programs = FastPrograms()

    def make(**model_args: Any) -> Any:
        lm = MoespecLM(**pair | model_args)
        lm.model.programs = programs  # distinguished by the method, of which the back-end is a part
        return lm

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
        patch.setattr(arguments, "load", functools.partial(load, backend=DENSE))
        yield make


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def evaluate(lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int = 4) -> dict[str, Any]:
    """The example tasks, as a user would run them."""
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(ROOT)
    manager = TaskManager(include_path="docs/examples/evaluate/tasks", include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=TASKS, task_manager=manager, limit=limit, bootstrap_iters=0)
    assert found is not None
    return found


def scores(found: dict[str, Any]) -> dict[str, float]:
    """The figures of every task, and what was said of every question."""
    figures = {f"{t} {m}": v for t, of in found["results"].items() for m, v in of.items() if isinstance(v, float)}
    return figures | {"samples": [[s["filtered_resps"] for s in found["samples"][task]] for task in TASKS]}


def test_plain_and_exact_speculative_decoding_score_alike(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluate(harness(tree="none", batch_size=8), tmp_path, monkeypatch)
    exact = evaluate(harness(tree=TREE, batch_size=8), tmp_path, monkeypatch)
    assert scores(plain) == scores(exact)
    config = {name: exact["config"][name] for name in ("exact", "tree", "budget", "loglikelihood")}
    assert config == {
        "exact": True,
        "tree": {"depth": 2, "top_k": 3, "size": 8},
        "budget": None,
        "loglikelihood": "a direct forward pass",
    }
    assert plain["config"]["tree"] is None and plain["config"]["exact"] is True
    json.dumps(exact["config"])


def test_a_budget_changes_scores_and_says_so(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = evaluate(harness(tree="none", batch_size=8), tmp_path, monkeypatch)
    lossy = evaluate(harness(tree=TREE, batch_size=8, **TIGHT), tmp_path, monkeypatch)
    assert scores(plain)["python_text bits_per_byte,none"] != scores(lossy)["python_text bits_per_byte,none"]
    config = lossy["config"]
    assert config["exact"] is False and config["budget"]["experts"] == (2, 3, 2)
    assert config["loglikelihood"] == "verifying passes under the budget" and config["tree"]["size"] == 8


TEXTS = [("def f(x):\n    return", " x + 1"), ("", "the cat"), ("a  ", "b"), ("the cat", " sat"), ("the cat", " sit")]


def direct(lm: Any, context: str, continuation: str) -> tuple[float, bool]:
    """From one forward pass over this text alone."""
    from driver import cached_logits

    spaces = len(context) - len(context.rstrip())  # belong to the continuation
    given = lm.model.encode(context[: len(context) - spaces]) or [0]
    ids = given + lm.model.encode(context + continuation)[len(given) if context else 0 :]
    logits = cached_logits(lm.model.config, lm.model.params, lm.model.backend, np.array([ids], np.int32))[0]
    log_p = np.asarray(jax.nn.log_softmax(jax.numpy.asarray(logits), axis=-1))
    spots = range(len(given) - 1, len(ids) - 1)
    return float(sum(log_p[i, ids[i + 1]] for i in spots)), all(log_p[i].argmax() == ids[i + 1] for i in spots)


@pytest.mark.parametrize("way", [dict(tree="none"), dict(tree=TREE), dict(tree=TREE, expert_budget=8)])
def test_log_likelihoods_are_the_forward_passes(harness: Any, way: dict[str, Any]) -> None:
    """Also through verifying passes that may read all experts; texts that differ in their last token share a row."""
    lm = harness(batch_size=4, **way)
    found = lm.loglikelihood(instances("loglikelihood", *TEXTS), disable_tqdm=True)
    for (log_p, greedy), text in zip(found, TEXTS, strict=True):
        expected = direct(lm, *text)
        assert abs(log_p - expected[0]) < 1e-4 and greedy == expected[1]


def test_rolling_log_likelihoods_are_of_all_windows(harness: Any) -> None:
    """Of a text longer than `max_length`, every token is predicted once, from the window that it ends in or before."""
    lm, text = harness(batch_size=4, max_length=16), "def add(a, b):\n    return a + b\n" * 2
    ids = [0, *lm.model.encode(text)]
    assert len(ids) > 33
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    total, done = 0.0, 0
    while done < len(ids) - 1:
        new = min(16, len(ids) - 1 - done)
        window = ids[max(0, done + new - 16) : done + new + 1]
        context, continuation = window[:-new], window[-new:]
        ((log_p, _),) = lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
        total, done = total + log_p, done + new
    assert found == pytest.approx(total, abs=1e-4)
    whole = lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("the cat",)), disable_tqdm=True)
    assert whole[0] == pytest.approx(direct(lm, "", "the cat")[0], abs=1e-4)


def test_texts_end_where_they_are_told_to(harness: Any) -> None:
    plain, lm = harness(tree="none"), harness(tree=TREE, batch_size=3)
    prompts = ["the cat", "def add(a", "naïve", "日本"]
    whole = [plain.model.generate(p, tree=None, max_new_tokens=24).prompts[0].text for p in prompts]
    ask = {"until": [], "max_gen_toks": 24, "do_sample": False}
    assert lm.generate_until(instances("generate_until", *((p, ask) for p in prompts)), disable_tqdm=True) == whole
    end = whole[0][5:7]
    ask |= {"until": ["never said", end]}
    found = lm.generate_until(instances("generate_until", *((p, ask) for p in prompts)), disable_tqdm=True)
    assert found == [text.split(end)[0] for text in whole] and found[0] != whole[0]
    short = lm.generate_until(instances("generate_until", ("the cat", ask | {"max_gen_toks": 3})), disable_tqdm=True)
    assert short == [plain.model.generate("the cat", tree=None, max_new_tokens=3).prompts[0].text.split(end)[0]]


def test_sampling_differs_from_request_to_request(harness: Any) -> None:
    lm = harness(tree=TREE, batch_size=2)
    ask = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0, "top_k": 50}
    requests = instances("generate_until", *[("the cat", ask)] * 4)
    found = lm.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) == 4 and lm.generate_until(requests, disable_tqdm=True) == found


def test_a_long_prompt_loses_its_beginning(harness: Any) -> None:
    lm = harness(tree="none", max_length=40)
    text = "the cat sat on the mat " * 8
    ids = lm.model.encode(text)[-30:]
    ask = {"until": [], "max_gen_toks": 10}
    expected = lm.model.generate([ids], tree=None, max_new_tokens=10).prompts[0].text
    assert lm.generate_until(instances("generate_until", (text, ask)), disable_tqdm=True) == [expected]
    with pytest.raises(RequestError, match="max_gen_toks below max_length of 40; got 40"):
        lm.generate_until(instances("generate_until", (text, {"max_gen_toks": 40})), disable_tqdm=True)


def test_generation_arguments_that_are_not_known_are_refused(harness: Any) -> None:
    lm = harness(tree="none")
    for ask, message in [
        ({"repetition_penalty": 1.2}, "got repetition_penalty"),
        ({"do_sample": True, "top_p": 2}, "top_p"),
    ]:
        with pytest.raises(RequestError, match=message):
            lm.generate_until(instances("generate_until", ("the cat", ask)), disable_tqdm=True)


def test_chats_are_put_in_the_models_template(harness: Any) -> None:
    lm, turns = harness(tree="none"), [{"role": "user", "content": "Why?"}]
    assert lm.apply_chat_template(turns) == "<user>Why?<a>"
    turns.append({"role": "assistant", "content": "Bec"})
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == "<user>Why?<assistant>Bec"
    assert "messages" in lm.chat_template(True) and "/" not in lm.tokenizer_name
    assert lm.prefix_token_id == lm.eot_token_id == 0


def test_lm_eval_finds_it_by_its_entry_point() -> None:
    """A version that knows plug-ins registers the entry point and loads it when it is asked for."""
    from lm_eval.api.registry import Registry

    from moespec_jax.evaluate.harness import MoespecLM

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "lm_eval.models"
    point = importlib.metadata.EntryPoint("moespec", project["entry-points"][group]["moespec"], group)
    registry = Registry("model")
    registry.register("moespec", target=point)
    assert registry.get("moespec") is MoespecLM and lm_eval.api.registry.get_model("moespec") is MoespecLM


def test_a_bad_command_line_ends_in_one_line(
    harness: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.__main__

    from moespec_jax.evaluate.lm_eval import main

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: harness(tree=TREE, expert_budget=99))
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: expected an expert budget from 2 to 8")
