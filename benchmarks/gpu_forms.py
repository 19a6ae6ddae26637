"""The parts of a layer that GPU back-ends compute in kernels of their own, against plain operations in float32.

`check_forms` runs each kernel at the shapes of OLMoE-1B-7B and Qwen3-30B-A3B, for one row and for 60, and returns the
largest error, as a share of the largest value. A kernel that does not compile or run is reported by its error, and the
others go on. `without` turns forms off, to compare times.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import Activation, ClampedSwiglu, DecoderConfig
from moespec_jax.decoding.budget import restrict
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.budget_rules import Nodes
from moespec_jax.measure.published_shapes import MODELS
from moespec_jax.nn.attention import Attention, attend, write_qkv
from moespec_jax.nn.attention_gpu import fused_attention
from moespec_jax.nn.backend import GPU_FORMS, PLAIN, Backend
from moespec_jax.nn.cache import Cache, keep_rows
from moespec_jax.nn.cache_gpu import move_rows
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.nn.experts.distinct_gpu import list_distinct, sum_places
from moespec_jax.nn.experts.gpu import sum_distinct
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.triton_gpu import slot_outputs
from moespec_jax.nn.layers import add_norm
from moespec_jax.nn.norm_gpu import fused_add_norm
from moespec_jax.nn.qkv_gpu import fused_qkv
from moespec_jax.nn.quantization import BLOCK, QUANTIZATIONS, Matrix, Mxfp4, Quantization, Quantized
from moespec_jax.nn.routing import Routing, combine_weights, normalise
from moespec_jax.nn.routing_gpu import choose
from moespec_jax.nn.shortlist_gpu import fused_shortlist
from moespec_jax.nn.top_k import most_probable
from moespec_jax.nn.top_k_gpu import fused_most_probable

FORMS = tuple(GPU_FORMS)
# Slots of the cache, and those that are filled.
SLOTS, START = 1024, 300
# Experts whose products are checked, of the model's size.
EXPERTS = 16
# Of values rounded to 8 bits several times; ids must agree.
TOLERANCE = 2**-6


class Case(NamedTuple):
    """A kernel, the same in plain operations, and arguments of both."""

    name: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: tuple[Any, ...]


def without(backend: Backend, forms: Sequence[str]) -> Backend:
    """Replace forms of a back-end by plain operations; `all` stands for all of them."""
    names = FORMS if "all" in forms else forms
    return backend._replace(**{name: getattr(PLAIN, name) for name in names})


def check_forms(interpret: bool = False, **changes: Any) -> dict[str, float | str]:
    """Compute the error of every kernel, or name what failed; `changes` are fields of the models' `config.json`."""
    cases = [
        (f"{case.name}, {model}, {rows} rows", case)
        for model in ("OLMoE-1B-7B", "Qwen3-30B-A3B")
        for rows in (1, 60)
        for case in cases_of(read_config(MODELS[model] | changes), rows, interpret)
    ]
    with ThreadPoolExecutor(8) as pool:  # compiles side by side
        found = dict(zip([name for name, _ in cases], pool.map(error_of, [case for _, case in cases]), strict=True))
    for name, error in found.items():
        if isinstance(error, str) or not error <= TOLERANCE:
            print(f"NOT RIGHT: {name}: {error}", flush=True)
    return found


def error_of(case: Case) -> float | str:
    """Largest error of any output as a share of its largest value, 1 where ids differ."""
    try:
        got = jax.jit(case.kernel)(*case.arguments)
        wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, case.arguments)
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(case.plain)(*wide)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        return round(max(_difference(np.asarray(a), np.asarray(b)) for a, b in pairs), 6)
    except Exception as error:  # of the compiler or the driver: the other kernels go on
        return f"{type(error).__name__}: {str(error)[:300]}"


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    if np.issubdtype(expected.dtype, np.integer):
        return float((got != expected).any())
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-9))


def cases_of(config: DecoderConfig, rows: int, interpret: bool) -> Iterator[Case]:
    """Every kernel for one sequence of `rows` tokens behind 300 in a cache of 1024 slots."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    store = tuple(normal(1, config.num_key_value_heads, SLOTS, config.head_dim) for _ in "kv")
    start = jnp.full((1,), START, jnp.int32)
    mask = (np.arange(SLOTS) < START)[None, None] | (rng.random((1, rows, SLOTS)) < 0.5)
    mask = jnp.asarray(mask & (np.arange(SLOTS) < START + rows))
    queries = normal(1, rows, config.num_attention_heads, config.head_dim)
    yield Case("attention", partial(fused_attention, interpret=interpret), attend, (queries, *store, mask))
    yield from layer_cases(config, rows, interpret, normal, store, start)
    logits = normal(rows, config.num_experts, dtype=jnp.float32)
    yield from routing_cases(config, rows, interpret, logits)
    experts = min(rows * config.num_experts_per_tok, config.num_experts)
    yield sum_case(config, interpret, logits, normal(experts, rows, config.hidden_size, dtype=jnp.float32))
    yield from expert_cases(config, interpret, normal, logits[:, :EXPERTS], normal(rows, config.hidden_size))
    fused = partial(fused_most_probable, k=10, interpret=interpret)
    yield Case("most_probable", fused, partial(most_probable, k=10), (normal(rows, 32000, dtype=jnp.float32),))
    path = jnp.asarray(np.sort(rng.permutation(max(rows, 9))[:9])[None], jnp.int32)

    def plain_move(stores: tuple[jax.Array, ...], start: jax.Array, path: jax.Array) -> Any:
        return keep_rows(Cache(stores, (), start), start, path, max(rows, 9)).k

    yield Case("keep_rows", partial(move_rows, interpret=interpret), plain_move, (store, start, path))


def layer_cases(
    config: DecoderConfig,
    rows: int,
    interpret: bool,
    normal: Callable[..., jax.Array],
    store: tuple[jax.Array, ...],
    start: jax.Array,
) -> Iterator[Case]:
    """Projection into the cache, and norm."""
    heads, groups, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    model, widths = config.hidden_size, (heads * head, groups * head, groups * head)
    norms = {"flat": widths[:2], "head": (head, head)}.get(config.qk_norm)
    q, k, v = (normal(width, model) * jnp.bfloat16(model**-0.5) for width in widths)
    weights = Attention(
        q, k, v, normal(widths[0], 1),
        q_norm=None if norms is None else normal(norms[0]), k_norm=None if norms is None else normal(norms[1]),
    )  # fmt: skip
    angle = normal(1, rows, head // 2, dtype=jnp.float32)
    arguments = (weights, normal(1, rows, model), (jnp.cos(angle), jnp.sin(angle)), store, start)
    fused = partial(fused_qkv, config, interpret=interpret)
    yield Case("write_qkv", fused, partial(write_qkv, config), arguments)

    def plain_norm(x: jax.Array, y: jax.Array, weight: jax.Array) -> Any:
        return add_norm(x, y, weight, 1e-5)

    def fused_norm(x: jax.Array, y: jax.Array, weight: jax.Array) -> Any:
        return fused_add_norm([x, y], weight, 1e-5, interpret=interpret)

    yield Case("add_norm", fused_norm, plain_norm, (normal(rows, model), normal(rows, model), normal(model)))


def routing_cases(config: DecoderConfig, rows: int, interpret: bool, logits: jax.Array) -> Iterator[Case]:
    """Routing without and with a budget of a quarter of the experts."""
    k, valid = config.num_experts_per_tok, jnp.ones((rows,), bool)
    budget, spread = resolve(BudgetConfig(0.25), config), jnp.linspace(1.0, 0.1, rows)[None]
    nodes = Nodes(spread, jnp.zeros((1, rows), jnp.int32), jnp.ones((1, rows, rows), bool), jnp.ones((rows,)))

    def plain_route(logits: jax.Array) -> Any:
        shares = jax.nn.softmax(logits, axis=-1)
        best, ids = jax.lax.top_k(shares, k)
        return ids, normalise(best) if config.norm_topk_prob else best, shares

    def plain_budget(logits: jax.Array, shortlist: Any = None) -> Any:
        ids, weights, shares = plain_route(logits)
        found = restrict(budget, nodes, config.norm_topk_prob, 0, shares, Routing(ids, weights), valid, shortlist)
        return (
            found.shortlist,
            found.routing.experts,
            found.routing.weights,
            found.mass_kept,
            found.replaced.astype(jnp.int32),
        )

    def fused_route(logits: jax.Array) -> Any:
        return choose(config, logits, valid.astype(jnp.int32), interpret=interpret)

    def fused_budget(logits: jax.Array) -> Any:
        fused: Any = partial(fused_shortlist, interpret=interpret)
        return plain_budget(logits, lambda plain, *rest: fused(*rest))

    yield Case("route", fused_route, plain_route, (logits,))
    yield Case("shortlist", fused_budget, plain_budget, (logits,))


def sum_case(config: DecoderConfig, interpret: bool, logits: jax.Array, outputs: jax.Array) -> Case:
    """List of distinct experts, and sum of their `outputs`."""
    best, ids = jax.lax.top_k(jax.nn.softmax(logits), config.num_experts_per_tok)
    experts = config.num_experts

    def fused(ids: jax.Array, best: jax.Array, outputs: jax.Array) -> Any:
        listed, places = list_distinct(Routing(ids, best), experts, interpret=interpret)
        return listed, sum_places(outputs, places, best, jnp.float32, interpret=interpret)

    def plain(ids: jax.Array, best: jax.Array, outputs: jax.Array) -> Any:
        listed = jnp.unique(ids, size=len(outputs), fill_value=experts)
        weights = combine_weights(Routing(ids, best), listed)
        return listed, jnp.einsum("ts,std->td", weights, outputs)

    return Case("list and sum of experts", fused, plain, (ids, best, outputs))


def expert_cases(
    config: DecoderConfig, interpret: bool, normal: Callable[..., jax.Array], logits: jax.Array, x: jax.Array
) -> Iterator[Case]:
    """`EXPERTS` experts of the model's size; and quantized, with biases and gpt-oss's activation."""
    model, ffn = config.hidden_size, config.moe_intermediate_size
    sizes = {"gate": (model, ffn), "up": (model, ffn), "down": (ffn, model)}
    best, ids = jax.lax.top_k(jax.nn.softmax(logits), min(config.num_experts_per_tok, EXPERTS))
    plain = {name: normal(EXPERTS, *size) * size[0] ** -0.5 for name, size in sizes.items()}
    biases = {f"{name}_bias": normal(EXPERTS, 1, size[1]) for name, size in sizes.items()}
    yield _expert_case("experts", interpret, "silu", Flat(**plain, num_experts=EXPERTS), x, Routing(ids, best))
    for form in QUANTIZATIONS:
        stored: Any = {name: random_stored(form, *size) for name, size in sizes.items()}
        experts = Flat(**stored, num_experts=EXPERTS, **biases)
        yield _expert_case(f"experts in {form}", interpret, ClampedSwiglu(), experts, x, Routing(ids, best))


def _expert_case(
    name: str, interpret: bool, activation: Activation, experts: Flat, x: jax.Array, routing: Routing
) -> Case:
    def fused(experts: Flat, x: jax.Array, routing: Routing) -> jax.Array:
        def run(rows: jax.Array, ids: jax.Array) -> jax.Array:
            return slot_outputs(activation, rows, experts, jnp.int32(0), ids, interpret=interpret)

        return sum_distinct(x, routing, EXPERTS, run, interpret=interpret)

    def every(experts: Flat, x: jax.Array, routing: Routing) -> jax.Array:
        return dense_experts(activation)(experts, 0, x, routing)

    return Case(name, fused, every, (experts, x, routing))


def random_stored(form: Quantization, inner: int, outer: int) -> Matrix:
    """Draw quantized matrices with weights of about `inner ** -0.5`, without quantizing any."""
    random = np.random.default_rng(inner)
    if form == "int8":
        values = random.integers(-127, 128, (EXPERTS, inner, outer), np.int8)
        return Quantized(jnp.asarray(values), jnp.full((EXPERTS, 1, outer), inner**-0.5 / 64, jnp.float32))
    codes = random.integers(0, 256, (EXPERTS, inner // 2, outer), np.uint8)
    usual = 126 - round(np.log2(inner) / 2)
    exponents = random.integers(usual - 1, usual + 2, (EXPERTS, inner // BLOCK, outer), np.uint8)
    return Mxfp4(jnp.asarray(codes), jnp.asarray(exponents))


def on(model: Any, backend: Backend) -> Any:
    """Take the same model with another back-end of the same layout."""
    return dataclasses.replace(model, backend=backend)
