"""Prompts of several turns: each later text of the user follows the answer to the one before."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moespec_jax.cli.prompts import Prompt
from moespec_jax.errors import RequestError
from moespec_jax.runtime.results import RunResult, joined


class Dialogues(NamedTuple):
    """Answers to prompts of one or several turns.

    Fields:
        result: of all batches; its `prompts` are the answers of the first prompt in the order of its turns, then those
            of the next.
        answers: for each prompt the places of its answers among them.
    """

    result: RunResult
    answers: list[list[int]]


def answer_turns(
    asked: Sequence[Prompt],
    first: RunResult,
    encode: Callable[[Prompt], list[int]],
    generate: Callable[[list[list[int]], int], RunResult],
) -> Dialogues:
    """Answer the later turns, one after another; the prompts that have a turn form its batch.

    Args:
        asked: prompts of the first batch; token ids may follow them there.
        first: result of the first batch.
        encode: token ids of a prompt.
        generate: decodes a batch; its second argument is the number of the turn, from 1.

    Raises:
        RequestError: a conversation does not fit the model's context.
    """
    results, places = [first], [[(0, number)] for number in range(len(first.prompts))]
    waiting = dict(enumerate(asked))
    while waiting := {number: prompt for number, prompt in waiting.items() if prompt.later}:
        for number, prompt in waiting.items():
            batch, place = places[number][-1]
            waiting[number] = _continued(prompt, results[batch].prompts[place].text or "")
        turn = len(results)
        try:
            results.append(generate([encode(prompt) for prompt in waiting.values()], turn))
        except RequestError as error:
            raise RequestError(f"{error}, in turn {turn + 1} of the conversations") from None
        for place, number in enumerate(waiting):
            places[number].append((turn, place))
    if len(results) == 1:
        return Dialogues(first, [[number] for number in range(len(places))])
    starts = [sum(map(len, places[:number])) for number in range(len(places))]
    answers = [[start + turn for turn in range(len(own))] for start, own in zip(starts, places, strict=True)]
    return Dialogues(joined(results, [place for own in places for place in own]), answers)


def _continued(prompt: Prompt, answer: str) -> Prompt:
    """Append an answer, and the next text of the user."""
    assert prompt.conversation is not None
    said, (text, *later) = prompt.conversation.turns, prompt.later
    turns = [*said, {"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    return Prompt(text, dataclasses.replace(prompt.conversation, turns=turns), tuple(later))
