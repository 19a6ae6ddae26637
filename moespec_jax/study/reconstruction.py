"""How much of the experts' output is lost where a budget takes the place of free choice, layer by layer.

The inputs are those of exact verifications, so that every layer is judged by itself and not by what the ones before it
lost. A shared expert is read in any case and left out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.budget_rules import Nodes
from moespec_jax.decoding.tree import ancestors, depths
from moespec_jax.measure.teacher_forcing import restrict_each
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.routing import Routing, normalise
from moespec_jax.runtime.model import Model
from moespec_jax.study.routing import TreeRouting


class Loss(NamedTuple):
    """Sums over rows, to be added up over rounds: of squared errors and of squared outputs, of all rows that stay in
    the tree (column 0) and of those that were committed (column 1); and of rows, in all and given up."""

    errors: Float[np.ndarray, "layers 2"]
    outputs: Float[np.ndarray, "layers 2"]
    rows: Float[np.ndarray, " layers"]
    given_up: Float[np.ndarray, " layers"]


class _Rule(NamedTuple):
    budget: BudgetConfig
    norm_topk_prob: bool


class _Compute(NamedTuple):
    """Back-end and activation of the expert compute."""

    backend: Backend
    activation: str


def loss(model: Model, seen: TreeRouting, rule: BudgetConfig, bound: int, exact: Array | None = None) -> Loss:
    """||y_budget - y||^2 and ||y||^2 under a rule that `bound` lowers to so many experts: give the rule all experts.

    Args:
        model: the one they were observed on.
        seen: the trees of one round (`routing.observed_rounds`), with their inputs.
        rule: how experts are chosen.
        bound: how many, for each tree.
        exact: `outputs(model, seen)`, where it is known already.

    Returns:
        Sums over the rows of all trees.
    """
    exact = outputs(model, seen) if exact is None else exact
    settings = _Rule(resolve(rule, model.config), model.config.norm_topk_prob)
    inputs, probabilities, experts = _rows(seen)
    routing, kept = model.programs.run(
        restricted, settings, model.params, _nodes(seen), probabilities, experts, jnp.int32(bound)
    )
    budgeted = model.programs.run(expert_outputs, _compute(model), model.params, inputs, routing)
    sums = jax.tree.map(np.asarray, _sums(budgeted, exact, kept, jnp.asarray(seen.committed.reshape(-1))))
    return Loss(*sums)


def outputs(model: Model, seen: TreeRouting) -> Float[Array, "layers rows model"]:
    """What the routed experts gave, layer by layer."""
    inputs, probabilities, experts = _rows(seen)
    routing = model.programs.run(natural, model.config.norm_topk_prob, model.params, probabilities, experts)
    return model.programs.run(expert_outputs, _compute(model), model.params, inputs, routing)


def natural(norm_topk_prob: bool, params: Decoder, probabilities: Array, experts: Array) -> Routing:
    """The routing of `routing.route`, from what it told of every layer."""
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    return Routing(experts, normalise(weights) if norm_topk_prob else weights)


def restricted(
    settings: _Rule,
    params: Decoder,
    nodes: Nodes,
    probabilities: Float[Array, "layers rows experts"],
    experts: Int[Array, "layers rows active"],
    bound: Int[Array, ""],
) -> tuple[Routing, Bool[Array, "layers rows"]]:
    """What a rule makes of every layer's routing, and which rows stay in the tree."""
    valid = jnp.ones(probabilities.shape[1], bool)

    def one(probabilities: Array, free: Routing) -> tuple[Routing, Array]:
        found = restrict_each(bound, settings.budget, nodes, settings.norm_topk_prob, 0, probabilities, free, valid)
        return found.routing, found.kept

    return jax.vmap(one)(probabilities, natural(settings.norm_topk_prob, params, probabilities, experts))


def expert_outputs(
    choice: _Compute, params: Decoder, inputs: Float[Array, "layers rows model"], routing: Routing
) -> Float[Array, "layers rows model"]:
    """The back-end's expert compute, layer by layer, in float32."""

    compute = choice.backend.compute(choice.activation)

    def one(layer: int | Array, rows: Array, routing: Routing) -> Array:
        return compute(params.experts, layer, rows, routing).astype(jnp.float32)

    if params.stacked:
        layers = jnp.arange(inputs.shape[0], dtype=jnp.int32)
        return jax.lax.map(lambda each: one(*each), (layers, inputs, routing))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], routing) for i in range(inputs.shape[0])]
    return jnp.stack([one(layer, inputs[layer], routing) for layer, routing in enumerate(each)])


@jax.jit
def _sums(budgeted: Array, exact: Array, kept: Array, committed: Array) -> tuple[Array, ...]:
    kinds = jnp.stack([kept, kept & committed[None, :]], axis=-1).astype(jnp.float32)
    error = jnp.sum((budgeted - exact) ** 2, axis=-1)
    output = jnp.sum(exact**2, axis=-1)
    rows = jnp.full(kept.shape[:1], kept.shape[1], jnp.float32)
    return (
        jnp.einsum("lr,lrc->lc", error, kinds),
        jnp.einsum("lr,lrc->lc", output, kinds),
        rows,
        rows - jnp.sum(kept, axis=1, dtype=jnp.float32),
    )


def _compute(model: Model) -> _Compute:
    return _Compute(model.backend, model.config.hidden_act)


def _rows(seen: TreeRouting) -> tuple[Array, Array, Array]:
    """Inputs, probabilities and experts with the rows of all trees in one axis."""

    def flat(values: np.ndarray) -> Array:
        return jnp.asarray(values.reshape(values.shape[0], -1, values.shape[-1]))

    return flat(seen.inputs), flat(seen.probabilities), flat(seen.experts)


def _nodes(seen: TreeRouting) -> Nodes:
    mask = jax.vmap(ancestors)(jnp.asarray(seen.parents))
    path_probability = jnp.exp(jnp.asarray(seen.scores))
    return Nodes(path_probability, jax.vmap(depths)(mask), mask, jnp.asarray(seen.acceptance_by_depth[0]))
