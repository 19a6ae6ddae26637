"""Recorded routing: of the draft trees of exact speculative decoding, and of texts."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.autoregressive import TargetPrefill
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.round_info import RoundInfo
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.state_specs import BY_SEQUENCE, LAYERS_BY_SEQUENCE, REPLICATED, tree_run_info_specs
from moespec_jax.errors import RequestError
from moespec_jax.measure.plain_pass import plain_pass
from moespec_jax.nn.decoder import Decoder, ForwardInfo
from moespec_jax.parallel.processes import fetch
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.padding import padded
from moespec_jax.runtime.run import Batch, Run


class TreeRouting(NamedTuple):
    """Verified trees of several texts, with the routing of each sparse layer.

    Fields:
        text: index of each tree's text.
        parents, scores: as in `tree.Tree`.
        committed: mask of the accepted nodes, the root included.
        acceptance_by_depth: share of earlier rounds that committed a node of each depth.
        probabilities: the router's probabilities of all experts.
        experts: expert ids.
        inputs: hidden states that router and experts read; width 0 where they were not kept.
    """

    text: Int[np.ndarray, " trees"]
    parents: Int[np.ndarray, "trees nodes"]
    scores: Float[np.ndarray, "trees nodes"]
    committed: Bool[np.ndarray, "trees nodes"]
    acceptance_by_depth: Float[np.ndarray, "trees depths"]
    probabilities: Float[np.ndarray, "layers trees nodes experts"]
    experts: Int[np.ndarray, "layers trees nodes active"]
    inputs: Float[np.ndarray, "layers trees nodes model"]


class _Observed(NamedTuple):
    """Routing of one round's verification, with the rows of all trees in one axis."""

    round_info: RoundInfo
    acceptance_by_depth: Float[Array, " depths"]
    probabilities: Float[Array, "layers rows experts"]
    experts: Int[Array, "layers rows active"]
    inputs: Float[Array, "layers rows model"]


def check_studied(model: Model) -> None:
    """Check that a model has a draft head and experts.

    Raises:
        RequestError: it lacks one of them.
    """
    if model.draft is None:
        raise RequestError(f"expected a draft head to draft trees with; {model.directory} was loaded without one")
    if not model.config.num_sparse_layers:
        raise RequestError(f"expected a model with experts to study; {model.directory} has none")


def tree_routing(
    model: Model, tree: TreeConfig, prompts: Sequence[Sequence[int]], rounds: int = 8, batch: int | None = None
) -> TreeRouting:
    """Record all trees of the first `rounds` rounds after every prompt, decoded exactly and greedily; without `inputs`.

    Raises:
        RequestError: the model has no draft head, or no experts.
    """
    parts = [
        trees._replace(inputs=trees.inputs[..., :0]) for trees in observed_rounds(model, tree, prompts, rounds, batch)
    ]
    return join(parts)


def join(parts: Sequence[TreeRouting]) -> TreeRouting:
    """Concatenate the trees of several rounds."""
    axes = TreeRouting(0, 0, 0, 0, 0, 1, 1, 1)  # pyright: ignore[reportArgumentType]
    return TreeRouting(*(np.concatenate(v, axis=a) for v, a in zip(zip(*parts, strict=True), axes, strict=True)))


def observed_rounds(
    model: Model, tree: TreeConfig, prompts: Sequence[Sequence[int]], rounds: int, batch: int | None = None
) -> Iterator[TreeRouting]:
    """Yield the trees of each round in turn, of `batch` prompts at a time (None: of all): exact greedy speculative
    decoding, which only the end of the context stops.

    Raises:
        RequestError: the model has no draft head, or no experts.
    """
    check_studied(model)
    method = model.speculative(model.resolve(DecodingSpec(tree)), SamplingConfig())
    params, programs = model.speculative_params, model.programs
    specs = method.specs(params)[0], _observed_specs()
    every = len(prompts) if batch is None else batch
    for first in range(0, len(prompts), every):
        part = [list(prompt) for prompt in prompts[first : first + every]]
        limits = [min(len(p) + 1 + rounds * tree.longest_path, model.config.context_length) for p in part]
        state = Run(programs, method, params, Batch(part, limits, (), 0)).state_after(0)
        for _ in range(rounds):
            # Not donated: a stacked cache has a layout of its own, which only a loop's carry can reuse in place.
            state, observed = programs.run(observed_round, method, params, state, specs=specs)
            yield _by_tree(jax.tree.map(fetch, observed), tree, first)


def _observed_specs() -> _Observed:
    """Sharding on a mesh: rows of all trees are split with the batch."""
    last = tree_run_info_specs(budget=False).last
    return _Observed(last, REPLICATED, *[LAYERS_BY_SEQUENCE] * 3)  # pyright: ignore[reportArgumentType]


def observed_round(
    method: Speculative[Any, Any], params: SpeculativeParams[Any], state: SpeculationState[Any]
) -> tuple[SpeculationState[Any], _Observed]:
    """Run a round; returns the routing of its verification too."""
    infos: list[ForwardInfo] = []

    def observed_forward(*arguments: Any, **named: Any) -> Any:
        found = method.target_forward(*arguments, **named)
        infos.append(found[2])
        return found

    acceptance = state.depth_counts / state.depth_counts[0]
    observed = dataclasses.replace(method, target_forward=observed_forward)
    state, round_info = observed.round(params, state)
    routers = infos[0].routers
    probabilities, experts, inputs = (
        jnp.stack([getattr(router, name) for router in routers]) for name in ("probabilities", "experts", "inputs")
    )
    return state, _Observed(round_info, acceptance, probabilities, experts, inputs)


def text_experts(
    model: Model, texts: Sequence[Sequence[int]], batch: int | None = None
) -> Int[np.ndarray, "layers tokens active"]:
    """Record the experts of every token of some texts, in one plain pass over `batch` texts at a time."""
    prefill, every = model.autoregressive(SamplingConfig()).prefill, len(texts) if batch is None else batch
    programs, longest, found = model.programs, max(len(text) for text in texts), []
    by_row: Any = LAYERS_BY_SEQUENCE
    for first in range(0, len(texts), every):
        count = len(texts[first : first + every])
        part, _ = padded([list(text) for text in texts[first : first + every]], [], programs.mesh)
        tokens = np.zeros((len(part), longest), np.int32)
        for row, text in zip(tokens, part, strict=True):
            row[: len(text)] = text
        lengths = np.array([len(text) for text in part], np.int32)
        given = programs.put(tokens, BY_SEQUENCE), programs.put(lengths, BY_SEQUENCE)
        chosen = fetch(programs.run(experts_of, prefill, model.params, *given, specs=by_row))[:, : count * longest]
        found.append(chosen[:, chosen[0, :, 0] < model.config.num_experts])
    return np.concatenate(found, axis=1)


def experts_of(
    prefill: TargetPrefill, params: Decoder, tokens: Int[Array, "texts tokens"], lengths: Int[Array, " texts"]
) -> Int[Array, "layers rows active"]:
    """Compute the experts of all rows; rows past the end of a text have id `num_experts`."""
    _, info = plain_pass(prefill.config, prefill.backend, params, tokens, lengths=lengths)
    return jnp.stack([router.experts for router in info.routers])


def _by_tree(observed: Any, tree: TreeConfig, first: int) -> TreeRouting:
    """Split the rows by tree, and drop the trees of finished sequences."""
    info = observed.round_info
    active, path, count = info.active, info.accepted.path, info.accepted.count
    committed = np.zeros((len(active), tree.size), bool)
    taken = np.arange(path.shape[1])[None, :] < count[:, None]
    committed[np.nonzero(taken)[0], path[taken]] = True

    def split(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(len(rows), len(active), tree.size, -1)[:, active]

    return TreeRouting(
        first + np.nonzero(active)[0],
        info.tree.parents[active],
        info.tree.scores[active],
        committed[active],
        np.repeat(observed.acceptance_by_depth[None], active.sum(), axis=0),
        split(observed.probabilities),
        split(observed.experts),
        split(observed.inputs),
    )
