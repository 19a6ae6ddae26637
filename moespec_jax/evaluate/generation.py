"""Batches of prompts continued in one way, each until a text is found in what it says."""

from collections.abc import Callable, Sequence

from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.ways import Way
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run

# Whether a sequence is over, from its number and its new token ids.
Over = Callable[[int, list[int]], bool]


class _AllOver(Exception):
    """Every sequence of a batch has said enough."""


def continue_batch(
    model: Model,
    way: Way,
    prompts: Sequence[list[int]],
    new: int,
    *,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    over: Over | None = None,
    size: int | None = None,
) -> list[list[int]]:
    """At most `new` token ids after each prompt, up to a stop id, decoded as one batch; greedily unless `sampling` says
    otherwise. It is filled up to `size` with copies, so that a last, smaller one compiles nothing. With `over`,
    decoding ends when it is true of all.

    Raises:
        RequestError: a prompt is empty or does not fit the context.
    """
    for prompt in prompts:
        if not 0 < len(prompt) < model.config.context_length:
            raise RequestError(
                f"expected prompts of 1 to {model.config.context_length - 1} tokens; one has {len(prompt)}"
            )
    filled = [*prompts, *[prompts[-1]] * ((size or len(prompts)) - len(prompts))]
    limits = [min(len(prompt) + new, model.config.context_length) for prompt in filled]
    run = Run(
        model.programs, way.method(model, sampling or SamplingConfig()), Batch(filled, limits, model.stop_ids, seed)
    )
    said: list[list[int]] = [[] for _ in filled]

    def listen(pieces: list[list[int]]) -> None:
        for ids, piece in zip(said, pieces, strict=True):
            ids += piece
        if over is not None and all(over(i, ids) for i, ids in enumerate(said[: len(prompts)])):
            raise _AllOver

    try:
        run.execute(on_tokens=listen)
    except _AllOver:
        pass
    return said[: len(prompts)]


def cut_at(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of its ends."""
    places = [text.find(end) for end in ends if end in text]
    return text[: min(places)] if places else text
