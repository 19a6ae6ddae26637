"""int8 experts: what rounding may cost, and that every form of expert compute multiplies by the same numbers."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny import tiny_tensors, write_tiny

from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, load_parameters, open_safetensors
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.generate import main
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.experts.cpu import cpu_experts
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.pallas_tpu import pallas_experts
from moespec_jax.nn.experts.slots import slot_experts
from moespec_jax.nn.layers import GatedMlp
from moespec_jax.nn.quantization import Quantized, quantize_rows, widened
from moespec_jax.nn.routing import Routing

EXPERTS, LAYERS, MODEL, FFN = 6, 2, 16, 48


@settings(derandomize=True, database=None, max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.booleans())
def test_every_weight_is_within_half_a_step(seed: int, size: float, empty_row: bool) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_t(2, (5, 33)) * size).astype(np.float32)
    matrix[0] *= not empty_row
    values, scale = quantize_rows(matrix)
    assert values.dtype == np.int8 and scale.dtype == np.float32
    # The largest weight of a row is the end of its scale, but for a row without weights.
    assert (np.abs(values).max(axis=1)[empty_row:] == 127).all() and (scale > 0).all()
    error = np.abs(values.astype(np.float64) * scale - matrix)
    assert (error <= scale.astype(np.float64) * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    """Rounded, it would vanish, and its whole channel with it."""
    directory = write_tiny(tmp_path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file(tiny_tensors() | {name: np.full_like(tiny_tensors()[name], value)}, directory / "model.safetensors")
    config = load_config(directory)
    with pytest.raises(CheckpointError, match="expected finite weights to quantize; of experts/1/2/up, it holds NaN"):
        load_parameters(directory, config, BACKENDS["slots"], "float32", quantization="int8")


def random_flat() -> Flat:
    rng = np.random.default_rng(0)

    def stack(rows: int, columns: int) -> Quantized:
        parts = [quantize_rows(rng.normal(size=(columns, rows)) * rows**-0.5) for _ in range(LAYERS * EXPERTS)]
        return Quantized(*(jnp.asarray(np.stack(part).swapaxes(1, 2)) for part in zip(*parts, strict=True)))

    return Flat(stack(MODEL, FFN), stack(MODEL, FFN), stack(FFN, MODEL), num_experts=EXPERTS)


def per_expert(flat: Flat) -> tuple[tuple[GatedMlp, ...], ...]:
    rows = [jax.tree.map(lambda leaf, r=r: leaf[r], flat) for r in range(LAYERS * EXPERTS)]
    mlps = [GatedMlp(row.gate, row.up, row.down) for row in rows]
    return tuple(tuple(mlps[layer * EXPERTS : (layer + 1) * EXPERTS]) for layer in range(LAYERS))


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("form", ["slots", "pallas", "switch"])
def test_forms_multiply_as_the_widened_matrices_do(form: str, tokens: int) -> None:
    quantized = random_flat()
    wide = jax.tree.map(lambda w: widened(w, jnp.dtype(jnp.float32)), quantized, is_leaf=lambda w: type(w) is Quantized)
    rng = np.random.default_rng(tokens)
    chosen = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :2].astype(np.int32)
    routing = Routing(jnp.asarray(chosen), jnp.asarray(rng.uniform(0.1, 1, chosen.shape), jnp.float32))
    x = jnp.asarray(rng.normal(size=(tokens, MODEL)), jnp.float32)
    computes = {"slots": slot_experts, "pallas": pallas_experts, "switch": cpu_experts}
    experts = per_expert(quantized) if form == "switch" else quantized
    compute = computes[form]("silu")
    got = fast_jit(lambda e, x, r: compute(e, 1, x, r))(experts, x, routing)
    expected = fast_jit(dense_experts("silu"))(wide, 1, x, routing)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("stored", ["safetensors", "orbax"])
@pytest.mark.parametrize("backend", ["switch", "slots"])
def test_a_checkpoint_is_quantized_as_it_is_read(tmp_path: Path, stored: str, backend: str) -> None:
    directory = write_tiny(tmp_path / "model")
    config = load_config(directory)
    if stored == "orbax":
        write_orbax(open_safetensors(directory, config), config, directory)
    params = load_parameters(directory, config, BACKENDS[backend], "float32", quantization="int8")
    plain = load_parameters(directory, config, BACKENDS[backend], "float32")
    for layer in range(config.num_sparse_layers):
        for e in range(config.num_experts):
            published = tiny_tensors()[f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight"]
            values, scale = quantize_rows(published)
            if backend == "switch":
                kept = params.experts[layer][e].down  # pyright: ignore[reportIndexIssue]
            else:
                kept = jax.tree.map(lambda leaf, row=layer * config.num_experts + e: leaf[row], params.experts.down)  # pyright: ignore[reportAttributeAccessIssue]
            np.testing.assert_array_equal(kept.values, values.T)
            np.testing.assert_array_equal(kept.scale, scale.T)
    rest = [jax.tree.leaves((p.layers, p.embed, p.norm, p.lm_head)) for p in (params, plain)]
    assert all(np.array_equal(a, b) for a, b in zip(*rest, strict=True))


def test_the_result_says_that_experts_are_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_tiny(tmp_path / "model")
    flags = ["--model", str(directory), "--prompt-ids", "5,6,7", "--max-new-tokens", "3", "--quantization", "int8"]
    assert main(flags) == 0
    shown = capsys.readouterr().err
    assert "float32, int8 experts" in shown and "exact for the int8 model, which differs from the checkpoint" in shown


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    from moespec_jax import load

    with pytest.raises(RequestError, match="expected a quantization of int8, mxfp4; got 'int3'"):
        inspect.unwrap(load)(str(write_tiny(tmp_path)), quantization="int3")  # pyright: ignore[reportArgumentType]
