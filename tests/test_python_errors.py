"""Arguments of wrong types from Python are one line; values print in one line."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from tiny import write_tiny
from tiny_pair import write_pair

import moespec_jax
from moespec_jax import BudgetConfig, MeshConfig, Model, RequestError, SamplingConfig, TreeConfig
from moespec_jax.decoding.budget_rules import SIZES
from moespec_jax.parallel.mesh import best_mesh, shard_decoder
from moespec_jax.runtime.tuned_profile import read_profile


@pytest.fixture(autouse=True)
def _without_the_type_checker() -> Any:
    """Users have none."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return moespec_jax.load(str(write_tiny(tmp_path_factory.mktemp("model"))))


PATH = "a directory or a hub id"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": 5}, f"expected model as {PATH}; got 5 (int)"),
        ({"model": None}, f"expected model as {PATH}; got None (NoneType)"),
        ({"model": b"x"}, f"expected model as {PATH}; got b'x' (bytes)"),
        ({"draft_model": ["x"]}, f"expected draft_model as {PATH}; got ['x'] (list)"),
        ({"revision": 1.5}, "expected revision as text; got 1.5 (float)"),
        (
            {"draft_boundaries": "1,2"},
            "expected draft_boundaries as whole numbers (2, 24, 45); got '1,2' (str)",
        ),
        ({"draft_boundaries": 3}, "expected draft_boundaries as whole numbers (2, 24, 45); got 3 (int)"),
        ({"dtype": "f32x"}, "expected dtype as float32, bfloat16 or float16; got 'f32x' (str)"),
        ({"backend": "slots"}, "expected backend as a back-end, such as BACKENDS['slots']; got 'slots' (str)"),
        ({"quantization": 8}, "expected a quantization of int8, mxfp4; got 8"),
        ({"mesh": 2}, 'expected mesh as a MeshConfig, a jax.sharding.Mesh or "auto"; got 2 (int)'),
        ({"mesh": "data=2"}, "expected mesh as a MeshConfig, a jax.sharding.Mesh or \"auto\"; got 'data=2' (str)"),
        ({"check": 1}, "expected check as a function; got 1 (int)"),
    ],
)
def test_load(model: Model, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        moespec_jax.load(**{"model": model.directory, **arguments})
    assert str(error.value) == says


PROMPTS = "text, or a list of texts or of lists of token ids"
WHOLE, NUMBER, FUNCTION = "a whole number", "a number", "a function"


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        (7, {}, f"expected prompts as {PROMPTS}; got 7 (int)"),
        (None, {}, f"expected prompts as {PROMPTS}; got None (NoneType)"),
        (b"abc", {}, f"expected prompts as {PROMPTS}; got b'abc' (bytes)"),
        ({"a": 1}, {}, f"expected prompts as {PROMPTS}; got {{'a': 1}} (dict)"),
        ([1.5], {}, "expected prompt 0 as text or a list of token ids; got 1.5 (float)"),
        (["a", None], {}, "expected prompt 1 as text or a list of token ids; got None (NoneType)"),
        ([b"a"], {}, "expected prompt 0 as text or a list of token ids; got b'a' (bytes)"),
        ([[5, 1.0]], {}, "expected token ids as whole numbers; prompt 0 holds 1.0 (float)"),
        ([["a"]], {}, "expected token ids as whole numbers; prompt 0 holds 'a' (str)"),
        ([[5, [6]]], {}, "expected token ids as whole numbers; prompt 0 holds [6] (list)"),
        (np.array([5, 6]), {}, "expected a list of prompts; for one prompt of token ids, wrap it: [[5, 17, 9]]"),
        ("x", {"max_new_tokens": "5"}, f"expected max_new_tokens as {WHOLE}; got '5' (str)"),
        ("x", {"max_new_tokens": None}, f"expected max_new_tokens as {WHOLE}; got None (NoneType)"),
        ("x", {"max_new_tokens": 5.0}, f"expected max_new_tokens as {WHOLE}; got 5.0 (float)"),
        ("x", {"temperature": "hot"}, f"expected temperature as {NUMBER}; got 'hot' (str)"),
        ("x", {"top_k": 1.5}, f"expected top_k as {WHOLE}; got 1.5 (float)"),
        ("x", {"top_p": [1]}, f"expected top_p as {NUMBER}; got [1] (list)"),
        ("x", {"min_p": "0.1"}, f"expected min_p as {NUMBER}; got '0.1' (str)"),
        ("x", {"min_p": 1.5}, "expected min_p from 0 to 1, got 1.5"),
        ("x", {"repetition_penalty": 0}, "expected a repetition_penalty above 0, got 0"),
        ("x", {"presence_penalty": float("nan")}, "expected a finite presence_penalty, got nan"),
        ("x", {"logits_processor": 3}, f"expected logits_processor as {FUNCTION}; got 3 (int)"),
        ("x", {"stop": 5}, "expected stop as text, or a list of texts; got 5 (int)"),
        ("x", {"stop": ["a", ""]}, "expected stop strings of at least one character; one is empty"),
        ("x", {"seed": "s"}, f"expected seed as {WHOLE}; got 's' (str)"),
        ("x", {"max_length": "9"}, f"expected max_length as {WHOLE}; got '9' (str)"),
        ("x", {"tree": "60/7/10"}, "expected tree as a TreeConfig, 'default', 'auto' or None; got '60/7/10' (str)"),
        ("x", {"tree": 4}, "expected tree as a TreeConfig, 'default', 'auto' or None; got 4 (int)"),
        ("x", {"budget": "16"}, "expected budget as a number or a BudgetConfig; got '16' (str)"),
        ("x", {"simulate_accept_length": "3"}, f"expected simulate_accept_length as {NUMBER}; got '3' (str)"),
        ("x", {"adapt": 1}, f"expected adapt as {FUNCTION}; got 1 (int)"),
        ("x", {"on_tokens": True}, f"expected on_tokens as {FUNCTION}; got True (bool)"),
        ("x", {"on_round": "f"}, f"expected on_round as {FUNCTION}; got 'f' (str)"),
        ("x", {"seed": "s" * 5000}, None),
    ],
)
def test_generate(model: Model, prompts: Any, options: dict[str, Any], says: str | None) -> None:
    with pytest.raises(RequestError) as error:
        model.generate(prompts, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert says is None or str(error.value) == says


@pytest.mark.parametrize(
    ("make", "fields", "says"),
    [
        (BudgetConfig, {"experts": "many"}, "experts of a budget as {per_layer}; got 'many' (str)"),
        (BudgetConfig, {"experts": None}, "experts of a budget as {per_layer}; got None (NoneType)"),
        (BudgetConfig, {"experts": [8, 8]}, "experts of a budget as {per_layer}; got [8, 8] (list)"),
        (BudgetConfig, {"experts": (8, "x")}, "experts of a budget as {per_layer}; got (8, 'x') (tuple)"),
        (BudgetConfig, {"size": "many"}, "a budget's size of {sizes}, or a function; got 'many' (str)"),
        (BudgetConfig, {"size": 3}, "a budget's size of {sizes}, or a function; got 3 (int)"),
        (BudgetConfig, {"mass": "most"}, "mass of a budget as a number; got 'most' (str)"),
        (BudgetConfig, {"anchor_probability": None}, "anchor_probability of a budget as a number; got None (NoneType)"),
        (BudgetConfig, {"min_kept_weight": (0.5,)}, "min_kept_weight of a budget as a number; got (0.5,) (tuple)"),
        (BudgetConfig, {"groups": "2"}, "groups of a budget as a whole number; got '2' (str)"),
        (BudgetConfig, {"groups": 2.0}, "groups of a budget as a whole number; got 2.0 (float)"),
        (SamplingConfig, {"temperature": "hot"}, "temperature as a number; got 'hot' (str)"),
        (SamplingConfig, {"temperature": None}, "temperature as a number; got None (NoneType)"),
        (SamplingConfig, {"top_k": 1.5}, "top_k as a whole number; got 1.5 (float)"),
        (SamplingConfig, {"top_p": [0.9]}, "top_p as a number; got [0.9] (list)"),
    ],
)
def test_settings(make: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        make(**({"experts": 8} if make is BudgetConfig else {}) | fields)
    per_layer = "a number, or a tuple with one for each layer"
    assert str(error.value) == f"expected {says.format(per_layer=per_layer, sizes=', '.join(SIZES))}"


def test_settings_hold_numbers_of_other_libraries() -> None:
    """What was right stays right."""
    assert SamplingConfig(np.float32(0.5), np.int64(3), np.float64(0.5)).top_k == 3  # pyright: ignore[reportArgumentType]
    assert BudgetConfig(8, mass=1, groups=np.int32(2)).groups == 2  # pyright: ignore[reportArgumentType]


def test_other_functions(model: Model) -> None:
    for call, says in [
        (lambda: model.encode(5), "expected a prompt as text; got 5 (int)"),  # pyright: ignore[reportArgumentType]
        (lambda: read_profile(5), "expected a profile as a file; got 5 (int)"),  # pyright: ignore[reportArgumentType]
        (lambda: TreeConfig("1"), "expected depth of a tree as a whole number; got '1' (str)"),  # pyright: ignore[reportArgumentType]
        (lambda: TreeConfig(size=4.0), "expected size of a tree as a whole number; got 4.0 (float)"),  # pyright: ignore[reportArgumentType]
        (lambda: MeshConfig(None), "expected data of a mesh as a whole number; got None (NoneType)"),  # pyright: ignore[reportArgumentType]
    ]:
        with pytest.raises(RequestError) as error:
            call()
        assert str(error.value) == says


@pytest.mark.usefixtures("fast_compile")
def test_whole_numbers_of_other_libraries_are_right(model: Model) -> None:
    expected = model.generate([[5, 6, 7]], max_new_tokens=3).prompts[0].token_ids
    for prompts in ([np.array([5, 6, 7])], np.array([[5, 6, 7]]), [jnp.array([5, 6, 7])], ((5, 6, 7),), [range(5, 8)]):
        result = model.generate(prompts, max_new_tokens=np.int64(3), temperature=np.float32(0), seed=np.int32(0))  # pyright: ignore[reportArgumentType]
        assert result.prompts[0].token_ids == expected
        assert all(type(i) is int for i in result.prompts[0].token_ids)


@pytest.mark.usefixtures("fast_compile")
def test_values_print_in_one_line(model: Model, tmp_path: Path) -> None:
    flags = write_pair(tmp_path, 4)
    pair = moespec_jax.load(flags[1], flags[3])
    result = model.generate([[5, 6, 7]], max_new_tokens=20)
    values = [pair, pair.params, pair.draft, pair.draft and pair.draft.head, result, *result.prompts, pair.programs]
    values += [pair.params.layers[0], pair.speculative_params]
    for value in values:
        text = repr(value)
        assert text.startswith(f"{type(value).__name__}(") and "\n" not in text and "Array(" not in text
        assert len(text) < 450, text
    sizes = f"{sum(leaf.size for leaf in jax.tree.leaves(pair.params)):,} numbers"
    assert sizes in repr(pair.params) and sizes in repr(pair)


@pytest.mark.parametrize("devices", range(1, 13))
@pytest.mark.parametrize("experts, heads, width", [(8, 4, 64), (5, 3, 256), (60, 16, 1408), (1, 1, 16)])
def test_a_mesh_is_found_for_every_number_of_devices(
    model: Model, devices: int, experts: int, heads: int, width: int
) -> None:
    config = dataclasses.replace(
        model.config, num_experts=experts, num_attention_heads=heads, num_key_value_heads=1, moe_intermediate_size=width
    )
    mesh = best_mesh(config, devices)
    assert mesh.devices == devices
    shard_decoder(config, mesh)
    # Sequences are divided only where the model cannot be.
    for tensor in range(1, devices + 1):
        if devices % tensor == 0:
            try:
                shard_decoder(config, MeshConfig(1, devices // tensor, tensor))
            except ValueError:
                continue
            assert mesh.data == 1
