"""Experts that are kept in MXFP4: by the format's definition, in every form of expert compute to the bit, and whole
models, which are those of the dequantized checkpoint."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_writer import E2M1
from published import same
from test_mxfp4_experts import stands_for, write
from tiny import write_tiny

from moespec_jax import load
from moespec_jax.checkpoint.parameters import abstract_decoder
from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.cli.summary import statistics_table
from moespec_jax.config import Activation, ClampedSwiglu, TreeConfig
from moespec_jax.errors import RequestError
from moespec_jax.nn.backend import BACKENDS, expert_form
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layers import GatedMlp
from moespec_jax.nn.quantization import Mxfp4, product, product_of_halves, quantize_blocks, widened
from moespec_jax.nn.routing import Routing

EXPERTS, LAYERS, MODEL, FFN = 6, 2, 64, 96
CLAMPED = ClampedSwiglu(alpha=1.702, limit=1.0)


def kept(matrix: np.ndarray) -> Mxfp4:
    """Matrices `[..., out, in]` as they are kept."""
    parts = [quantize_blocks(one) for one in matrix.reshape(-1, *matrix.shape[-2:])]
    arrays = (np.stack(part).swapaxes(1, 2) for part in zip(*parts, strict=True))
    return Mxfp4(*(jnp.asarray(a.reshape(*matrix.shape[:-2], *a.shape[1:])) for a in arrays))


@settings(derandomize=True, database=None, max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 15))
def test_weights_in_mxfp4_are_kept_to_the_bit(seed: int, largest: int) -> None:
    """With any scale: blocks of small codes alone too, which other scales would suit better."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice([*range(largest + 1)], (1, 7, 2, 16)) | rng.choice([*range(largest + 1)], (1, 7, 2, 16)) << 4
    scales = rng.integers(4, 253, (1, 7, 2))
    weights = stands_for(blocks.astype(np.uint8), scales.astype(np.uint8))[0]
    got = widened(kept(weights), jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(np.asarray(got), weights.T)


@settings(derandomize=True, database=None, max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_other_weights_are_rounded_to_the_nearest_number(seed: int, size: float) -> None:
    matrix = (np.random.default_rng(seed).standard_t(2, (5, 64)) * size).astype(np.float32)
    matrix[0, :32] = 0
    got = np.asarray(widened(kept(matrix), jnp.dtype(jnp.float32))).T
    for weights, rounded in zip(matrix.reshape(-1, 32), got.reshape(-1, 32), strict=True):
        if not weights.any():
            assert not rounded.any()
            continue
        scale = np.exp2(np.floor(np.log2(np.abs(weights).max())) - 2)  # OCP Microscaling Formats 1.0, 6.3
        distances = np.abs(weights[:, None] - E2M1 * scale)
        np.testing.assert_array_equal(np.abs(weights - rounded), distances.min(axis=1))


def test_a_weight_takes_17_of_32_bytes_and_every_number_has_its_code() -> None:
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16)
    numbers = widened(Mxfp4(codes, jnp.full((1, 16), 128, jnp.uint8)), jnp.dtype(jnp.bfloat16))
    both = np.concatenate([np.arange(256).reshape(16, 16) & 15, np.arange(256).reshape(16, 16) >> 4])
    np.testing.assert_array_equal(np.asarray(numbers, np.float32), 2 * np.asarray(E2M1)[both])
    matrices = kept(np.ones((3, 96, 64), np.float32))
    assert 32 * (matrices.codes.nbytes + matrices.exponents.nbytes) == 17 * 3 * 96 * 64


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="it holds NaN or infinity"):
        quantize_blocks(np.full((3, 32), value, np.float32))


@cache
def random_flat(biases: bool) -> Flat:
    rng = np.random.default_rng(0)

    def stack(rows: int, columns: int) -> Mxfp4:
        return kept(rng.normal(size=(LAYERS * EXPERTS, columns, rows)) * rows**-0.5)

    flat = Flat(stack(MODEL, FFN), stack(MODEL, FFN), stack(FFN, MODEL), num_experts=EXPERTS)
    if not biases:
        return flat
    rows = {"gate_bias": FFN, "up_bias": FFN, "down_bias": MODEL}
    return flat.replace(  # pyright: ignore[reportAttributeAccessIssue]
        **{name: jnp.asarray(rng.normal(size=(LAYERS * EXPERTS, 1, n)), jnp.float32) for name, n in rows.items()}
    )


def cast(experts: Flat, dtype: str) -> Flat:
    """Experts with biases in a dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, experts)


def dequantized(experts: Flat, dtype: str) -> Flat:
    def wide(leaf: Any) -> Any:
        return widened(leaf, jnp.dtype(dtype)) if isinstance(leaf, Mxfp4) else leaf

    return jax.tree.map(wide, experts, is_leaf=lambda leaf: isinstance(leaf, Mxfp4))


def per_expert(flat: Flat) -> tuple[tuple[GatedMlp, ...], ...]:
    fields = {name: getattr(flat, name) for name in GatedMlp.__dataclass_fields__}
    mlps = [GatedMlp(**jax.tree.map(lambda leaf, r=r: leaf[r], fields)) for r in range(LAYERS * EXPERTS)]
    return tuple(tuple(mlps[layer * EXPERTS : (layer + 1) * EXPERTS]) for layer in range(LAYERS))


FORMS: list[tuple[str, int, Activation, str]] = [
    *(("slots", tokens, CLAMPED, "float32") for tokens in (1, 5, 70)),
    *(("switch", tokens, CLAMPED, "float32") for tokens in (1, 5)),
    *((form, 5, CLAMPED, "float32") for form in ("dense", "pallas", "fused")),
    *((form, 5, "silu", "bfloat16") for form in ("switch", "slots")),
]


@pytest.mark.parametrize(("form", "tokens", "activation", "dtype"), FORMS)
def test_every_form_computes_what_it_does_of_dequantized_matrices(
    form: str, tokens: int, activation: Activation, dtype: str
) -> None:
    """To the bit, with biases and the clamped activation of gpt-oss and without."""
    rng = np.random.default_rng(tokens)
    chosen = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :2].astype(np.int32)
    routing = Routing(jnp.asarray(chosen), jnp.asarray(rng.uniform(0.1, 1, chosen.shape), jnp.float32))
    x = jnp.asarray(rng.normal(size=(tokens, MODEL)), dtype)
    compute = fast_jit(lambda experts, x, routing: BACKENDS[form].compute(activation)(experts, 1, x, routing))
    held = cast(random_flat(activation == CLAMPED), dtype)
    both = (held, dequantized(held, dtype))
    got, expected = (compute(per_expert(e) if form == "switch" else e, x, routing) for e in both)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))
    assert np.abs(np.asarray(got, np.float32)).max() > 0.1


def test_the_sum_of_both_halves_is_the_product() -> None:
    """The product of a TPU sums in another order, and so is equal to rounding."""
    rng = np.random.default_rng(0)
    matrix, x = kept(rng.normal(size=(96, 64))), jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(widened(matrix, jnp.dtype(jnp.float32)), np.float64)
    for compute in (product, product_of_halves):
        np.testing.assert_allclose(compute(x, matrix), expected, atol=1e-5, rtol=0)


def test_kernels_name_what_runs_in_their_place() -> None:
    for name in ("pallas", "mosaic"):
        shown = expert_form(BACKENDS[name], "silu", random_flat(False), jnp.bfloat16, BACKENDS[name].platform or "tpu")
        assert shown.startswith(f"slots ({name} does not support ") and ("MXFP4" in shown or "quantized" in shown)


@pytest.mark.parametrize("backend", ["slots", "switch"])
def test_published_experts_are_kept_and_no_other_weight_changes(backend: str, tmp_path: Path) -> None:
    quantized, plain, _ = write(tmp_path)
    config = load_config(quantized)
    held = load_parameters(quantized, config, BACKENDS[backend], "bfloat16", quantization="mxfp4")
    expected = load_parameters(plain, config, BACKENDS[backend], "bfloat16")
    wide = jax.tree.map(
        lambda leaf: widened(leaf, jnp.dtype(jnp.bfloat16)) if isinstance(leaf, Mxfp4) else leaf,
        held,
        is_leaf=lambda leaf: isinstance(leaf, Mxfp4),
    )
    # A number of 0 may have another sign.
    assert jax.tree.structure(wide) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(wide), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    described = abstract_decoder(config, BACKENDS[backend], "bfloat16", quantization="mxfp4")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), held) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), described
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:an expert budget")
@pytest.mark.usefixtures("fast_compile")
def test_a_model_kept_in_mxfp4_generates_what_the_dequantized_one_does(tmp_path: Path) -> None:
    """Plainly, by a tree of its own drafts, and under budgets; every result says what it is."""
    quantized, _, _ = write(tmp_path)
    found = {}
    for quantization in (None, "mxfp4"):
        model = inspect.unwrap(load)(str(quantized), "self:1", quantization=quantization, dtype="float32")
        tree = TreeConfig(2, 2, 6)
        runs = [
            model.generate([[5, 6, 7], [9]], max_new_tokens=8, ignore_eos=True, **how)
            for how in ({"tree": None}, {"tree": tree}, {"tree": tree, "budget": 2})
        ]
        found[quantization] = [[prompt.token_ids for prompt in run.prompts] for run in runs]
        assert found[quantization][0] == found[quantization][1]
        table = statistics_table(model, runs[0], None)
        rest = "experts kept as published, others dequantized" if quantization else "dequantized"
        assert (
            f"\nweights      published in MXFP4, {rest} to float32\n" in table
            and "\noutput       exact, plain" in table
        )
        assert runs[0].checkpoint_format == "MXFP4" and runs[0].quantization == quantization
    assert found[None] == found["mxfp4"]


def test_experts_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path)
    with pytest.raises(RequestError, match="expected experts whose sizes are multiples of 32 for mxfp4; got 32 x 16"):
        load_parameters(directory, load_config(directory), BACKENDS["slots"], "float32", quantization="mxfp4")


def test_a_plain_checkpoint_is_quantized_as_it_is_read(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path, moe_intermediate_size=32)
    config = load_config(directory)
    held = load_parameters(directory, config, BACKENDS["slots"], "float32", quantization="mxfp4")
    plain = load_parameters(directory, config, BACKENDS["slots"], "float32")
    assert isinstance(held.experts, Flat) and isinstance(plain.experts, Flat)
    for name in ("gate", "up", "down"):
        expected = kept(np.asarray(getattr(plain.experts, name)).swapaxes(1, 2))
        assert same(getattr(held.experts, name), expected)  # pyright: ignore[reportArgumentType]
