"""Error of the experts' output under a budget, layer by layer.

Inputs are those of exact verifications, so that the error of a layer does not contain that of the layers before it.
Shared experts are read in any case, and left out. On a mesh every device has the rows of all trees.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import Activation, DecoderConfig, RouterConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.budget_rules import Nodes
from moespec_jax.decoding.state_specs import REPLICATED
from moespec_jax.decoding.tree import ancestors, depths
from moespec_jax.measure.teacher_forcing import restrict_each
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.moe import SparseMlp, routed_by
from moespec_jax.nn.routing import Routing, normalise, route, shard_routing
from moespec_jax.parallel.collectives import psum
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.programs import Programs
from moespec_jax.study.routing import TreeRouting


class Loss(NamedTuple):
    """Sums over rows, which add up over rounds.

    Fields:
        errors: squared errors, of all rows that stay in the tree (column 0) and of the committed ones (column 1).
        outputs: squared outputs without a budget, of the same rows.
        rows: number of rows.
        given_up: number of pruned rows.
    """

    errors: Float[np.ndarray, "layers 2"]
    outputs: Float[np.ndarray, "layers 2"]
    rows: Float[np.ndarray, " layers"]
    given_up: Float[np.ndarray, " layers"]


class _Rule(NamedTuple):
    """Resolved budget, and the model's settings."""

    budget: BudgetConfig
    config: DecoderConfig


class _Compute(NamedTuple):
    """Back-end and activation of the expert compute, experts of a layer, and form of their router."""

    backend: Backend
    activation: Activation
    num_experts: int
    router: RouterConfig


# Sharding of all results on a mesh.
_WHOLE: Any = REPLICATED


def loss(model: Model, trees: TreeRouting, rule: BudgetConfig, bound: int, exact: Array | None = None) -> Loss:
    """Sum ||y_budget - y||^2 and ||y||^2 over the rows of all trees, under a rule and without a budget.

    Args:
        model: the model of the trees.
        trees: those of one round (`routing.observed_rounds`), with their inputs.
        rule: a budget of all experts, which `bound` lowers: one program then serves all bounds.
        bound: largest number of experts that a layer reads for a tree.
        exact: `outputs(model, trees)`, if it was computed before.
    """
    exact = outputs(model, trees) if exact is None else exact
    settings = _Rule(resolve(rule, model.config), model.config)
    programs, (inputs, probabilities, experts) = model.programs, _rows(model.programs, trees)
    most = programs.put(np.array(bound, np.int32))
    routing, kept = programs.run(
        restricted, settings, model.params, _nodes(programs, trees), inputs, probabilities, experts, most, specs=_WHOLE
    )
    budgeted = programs.run(expert_outputs, _compute(model), model.params, inputs, routing, specs=_WHOLE)
    sums = jax.tree.map(np.asarray, _sums(budgeted, exact, kept, jnp.asarray(trees.committed.reshape(-1))))
    return Loss(*sums)


def outputs(model: Model, trees: TreeRouting) -> Float[Array, "layers rows model"]:
    """Compute the routed experts' outputs without a budget, layer by layer."""
    programs, rows = model.programs, _rows(model.programs, trees)
    routing = programs.run(natural, model.config, model.params, *rows, specs=_WHOLE)
    routing = dataclasses.replace(routing, choice=None)
    return programs.run(expert_outputs, _compute(model), model.params, rows[0], routing, specs=_WHOLE)


def natural(config: DecoderConfig, params: Decoder, inputs: Array, probabilities: Array, experts: Array) -> Routing:
    """Rebuild the result of `routing.route` from each layer's probabilities and expert ids, or, where it depends on
    more, from the inputs."""
    if config.router.ranks_by_probability:
        weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        return Routing(experts, normalise(weights) if config.norm_topk_prob else weights)
    valid = jnp.ones(inputs.shape[1], bool)
    each = [
        route(config, mlp.router, rows, valid, mlp.router_bias, mlp.correction)[0]
        for mlp, rows in zip(_sparse_mlps(params), inputs, strict=True)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _sparse_mlps(params: Decoder) -> list[SparseMlp]:
    """List the sparse layers' parameters in order of depth."""
    mlps = [layer.mlp for layer in params.layers if isinstance(layer.mlp, SparseMlp)]
    if not params.stacked:
        return mlps
    return [jax.tree.map(lambda leaf, i=i: leaf[i], mlp) for mlp in mlps for i in range(len(mlp.router))]


def restricted(
    settings: _Rule,
    params: Decoder,
    nodes: Nodes,
    inputs: Float[Array, "layers rows model"],
    probabilities: Float[Array, "layers rows experts"],
    experts: Int[Array, "layers rows active"],
    bound: Int[Array, ""],
) -> tuple[Routing, Bool[Array, "layers rows"]]:
    """Apply a rule to every layer; returns the routing, and the rows that stay in the tree."""
    valid = jnp.ones(probabilities.shape[1], bool)

    def one(probabilities: Array, free: Routing) -> tuple[Routing, Array]:
        norm = settings.config.norm_topk_prob
        found = restrict_each(bound, settings.budget, nodes, norm, 0, probabilities, free, valid)
        return found.routing, found.kept

    return jax.vmap(one)(probabilities, natural(settings.config, params, inputs, probabilities, experts))


def expert_outputs(
    choice: _Compute, params: Decoder, inputs: Float[Array, "layers rows model"], routing: Routing
) -> Float[Array, "layers rows model"]:
    """Run the back-end's expert compute layer by layer; results are float32."""

    compute = routed_by(choice.router, choice.backend.compute(choice.activation))
    sharding = params.sharding

    def one(layer: int | Array, rows: Array, routing: Routing) -> Array:
        local = shard_routing(routing, choice.num_experts, sharding.experts)
        return psum(compute(params.experts, layer, rows, local).astype(jnp.float32), sharding.routed)

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
    config = model.config
    return _Compute(model.backend, config.expert_activation, config.num_experts, config.router)


def _rows(programs: Programs, trees: TreeRouting) -> tuple[Array, Array, Array]:
    """Flatten inputs, probabilities and experts to one axis of the rows of all trees."""

    def flat(values: np.ndarray) -> Array:
        return programs.put(values.reshape(values.shape[0], -1, values.shape[-1]))

    return flat(trees.inputs), flat(trees.probabilities), flat(trees.experts)


def _nodes(programs: Programs, trees: TreeRouting) -> Nodes:
    mask = jax.vmap(ancestors)(jnp.asarray(trees.parents))
    path_probability = jnp.exp(jnp.asarray(trees.scores))
    nodes = Nodes(path_probability, jax.vmap(depths)(mask), mask, jnp.asarray(trees.acceptance_by_depth[0]))
    return jax.tree.map(lambda leaf: programs.put(np.asarray(leaf)), nodes)
