"""Model arguments of lm-evaluation-harness are the flags of the commands here."""

from typing import Any

import pytest

from moespec_jax.cli.arguments import requested_spec
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.lm_eval import with_mesh_argument
from moespec_jax.evaluate.model_args import AUTO_BATCH, read_model_args
from moespec_jax.runtime.load import DEMO_TARGET


@pytest.mark.parametrize("least", ["budget_min_kept_weight", "budget_faithfulness"])  # the second is an older name
def test_arguments_are_flags_without_dashes(least: str) -> None:
    found = read_model_args(
        {
            "pretrained": "DIR", "draft_model": "HEAD", "tree": "60/7/10", "expert_budget": "8/12/0.5",
            least: 0.5, "budget_anchor": "root", "dtype": "bfloat16", "batch_size": "4",
            "max_batch_size": None, "device": "cuda:0", "offline": True, "no_thinking": False, "max_length": 512,
        }
    )  # fmt: skip
    budget = BudgetConfig((8, 12, 0.5), anchor="root", min_kept_weight=0.5)
    assert requested_spec(found) == DecodingSpec(TreeConfig(7, 10, 60), budget)
    assert (found.model, found.draft_model, found.dtype, found.offline) == ("DIR", "HEAD", "bfloat16", True)
    assert (found.batch_size, found.max_length, found.no_thinking, found.plain) == (4, 512, False, False)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({}, "model", DEMO_TARGET),
        ({}, "batch_size", 1),
        ({"tree": None}, "plain", True),
        ({"tree": "none"}, "plain", True),
        ({"tree": 16}, "tree_size", 16),
        ({"draft_model": None}, "draft_model", "none"),
        ({"expert_budget": None}, "expert_budget", "none"),
        ({"budget_anchor": None}, "budget_anchor", "none"),
        ({"dtype": None}, "dtype", None),
        ({"batch_size": "auto"}, "batch_size", AUTO_BATCH),
        ({"profile": "p.json", "max_kl": 0.01}, "max_kl", 0.01),
        ({}, "mesh", None),
        ({"mesh": None}, "mesh", None),
        ({"mesh": "auto"}, "mesh", "auto"),
        ({"mesh": "data=2/tensor=4"}, "mesh", "data=2,tensor=4"),
    ],
)
def test_none_and_defaults(given: dict[str, Any], name: str, value: Any) -> None:
    """lm-eval reads `none` as a value of its own."""
    assert getattr(read_model_args(given), name) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts": 8}, "--experts"),
        ({"tree": "60/7/10/2"}, "unrecognized arguments: 2"),
        ({"tree": "a/b"}, "--tree-size"),
        ({"budget_score": "luck"}, "invalid choice: 'luck'"),
        ({"batch_size": 0}, "batch_size of at least 1"),
    ],
)
def test_others_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_model_args(given)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run", "--model", "moespec"], ["run", "--model", "moespec"]),
        (["run", "--mesh", "data=2", "--tasks", "a"], ["run", "--tasks", "a", "--model_args", "mesh=data=2"]),
        (
            ["run", "--model_args", "pretrained=DIR,tree=none", "--mesh=expert=4,tensor=2"],
            ["run", "--model_args", "pretrained=DIR,tree=none,mesh=expert=4/tensor=2"],
        ),
        (["-a", '{"pretrained": "DIR"}', "--mesh", "auto"], ["--model_args", '{"pretrained": "DIR", "mesh": "auto"}']),
    ],
)
def test_a_mesh_becomes_a_model_argument(argv: list[str], expected: list[str]) -> None:
    assert with_mesh_argument(argv) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mesh"], "expected one argument"),
        (["--mesh", "auto", "--model_args", "a=1,mesh=auto"], "expected one mesh"),
        (["--mesh", "auto", "--model_args", '{"mesh": "auto"}'], "expected one mesh"),
    ],
)
def test_a_mesh_is_given_once(argv: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        with_mesh_argument(argv)
