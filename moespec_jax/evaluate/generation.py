"""Generation of continuations under one spec, up to a condition on each sequence."""

from collections.abc import Callable, Sequence

from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.specs import EvaluatedSpec, start_run
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch

# (index of a sequence, its new token ids) -> whether the sequence is finished.
Finished = Callable[[int, list[int]], bool]


def continue_batch(
    model: Model,
    evaluated: EvaluatedSpec,
    prompts: Sequence[list[int]],
    new: int,
    *,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    over: Finished | None = None,
    size: int | None = None,
) -> list[list[int]]:
    """Generate at most `new` token ids after each prompt, up to a stop id, as one batch.

    Args:
        model: target and draft head.
        evaluated: how to decode.
        prompts: token ids.
        new: largest number of new tokens.
        sampling: greedy by default.
        seed: of random draws.
        over: condition; decoding stops when it is true of every sequence.
        size: batch size; copies of the last prompt fill a smaller batch, which then runs the same program.

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
    run = start_run(model, evaluated, sampling or SamplingConfig(), Batch(filled, limits, model.stop_ids, seed))
    new_ids: list[list[int]] = [[] for _ in filled]

    def collect(parts: list[list[int]]) -> None:
        for ids, part in zip(new_ids, parts, strict=True):
            ids += part

    def is_ended() -> bool:
        return over is not None and all(over(i, ids) for i, ids in enumerate(new_ids[: len(prompts)]))

    run.execute(on_tokens=collect, is_ended=is_ended)
    return new_ids[: len(prompts)]


def cut_at(text: str, ends: Sequence[str]) -> str:
    """Cut a text before the first occurrence of any of `ends`."""
    starts = [text.find(end) for end in ends if end in text]
    return text[: min(starts)] if starts else text
