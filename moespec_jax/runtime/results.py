"""What a run gave: texts and tokens, how long each part took, what was read, and whether it is exact."""

import dataclasses
import importlib.metadata
from typing import Any


@dataclasses.dataclass
class PromptResult:
    """What one prompt gave. Text fields are None where there is no tokenizer.

    `finish_reason` is "stop" (a stop id, which is the last of `token_ids`), "length" (`max_new_tokens`) or "context".
    `rounds` counts the target's forward passes after prefill. `accept_length` is the mean number of tokens a round
    gained, the drafted ones it accepted and one more, even if a stop id or the limit cut some off; 1 in plain decoding.
    `accepted_by_depth[d]` is the share of rounds that accepted a drafted token at depth d + 1.
    """

    text: str | None
    token_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    accept_length: float
    accepted_by_depth: list[float]
    finish_reason: str


@dataclasses.dataclass
class RunResult:
    """What one batch gave, and how long each part took in seconds. `tokens_per_s` counts tokens after the first of each
    sequence over `decode_s`; compilation is in neither. `tree` is None where nothing was drafted; with a
    `simulated_accept_length` the tokens are not the model's and only times mean anything.

    `experts_wanted` and `experts_loaded` are distinct experts a layer and forward pass: what its tokens chose, and what
    was read; `experts_slowest` is the most that one device of the `mesh` read. Under a `budget`, `mass_kept` is the
    shortlists' share of the scores they were ranked by, and `tokens_replaced` the share of tokens, over layers, that
    lost at least one expert of their own. `exact` says whether the output is known to be the model's own (greedy: token
    for token; sampled: in distribution), which is that of the quantized model where there is a `quantization`."""

    prompts: list[PromptResult]
    experts_wanted: float
    experts_loaded: float
    experts_slowest: float
    mass_kept: float
    tokens_replaced: float
    exact: bool
    greedy: bool
    budget: dict[str, Any] | None
    tree: dict[str, Any] | None
    draft_model: str | None
    simulated_accept_length: float | None
    compile_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    mesh: dict[str, int] | None
    device: str
    dtype: str
    quantization: str | None
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Of the libraries a result depends on, and ours."""
    import moespec_jax

    names = ("jax", "jaxlib", "flax", "transformers")
    # Our own from the source: a checkout that was never installed has no metadata.
    return {name: importlib.metadata.version(name) for name in names} | {"moespec_jax": moespec_jax.__version__}
