"""Log-probabilities of the new tokens of a sequence, as results give them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from moespec_jax.decoding.logprobs import Logprobs


@dataclasses.dataclass
class LikelyToken:
    """A token and its log-probability.

    Fields:
        token_id: id.
        text: of this token by itself; special tokens have their names. None where there is no tokenizer.
        logprob: in nats.
    """

    token_id: int
    text: str | None
    logprob: float


@dataclasses.dataclass
class TokenLogprob(LikelyToken):
    """A new token; `top` holds the most probable tokens at its place, best first."""

    top: list[LikelyToken]


def token_logprobs(
    logprobs: Logprobs, sequence: int, ids: Sequence[int], start: int, tokenizer: Tokenizer | None
) -> list[TokenLogprob]:
    """List those of the tokens `ids` of a sequence, which begin at position `start`; arrays are on the host."""

    def likely(token_id: int, logprob: float) -> LikelyToken:
        text = None if tokenizer is None else tokenizer.decode([token_id], skip_special_tokens=False)
        return LikelyToken(token_id, text, logprob)

    places = range(start, start + len(ids))
    own, top, top_ids = (np.asarray(part)[sequence, places].tolist() for part in dataclasses.astuple(logprobs))
    return [
        TokenLogprob(**vars(likely(token_id, logprob)), top=[*map(likely, best, values)])
        for token_id, logprob, values, best in zip(ids, own, top, top_ids, strict=True)
    ]
