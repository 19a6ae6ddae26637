"""Random `config.json` of the families whose attention has forms of its own: the published defaults first, then every
option of the config class in turn."""

from typing import Any

import numpy as np
from hf_models import CONTEXT, ROPES, Fields, draw_rope

FAMILIES = ("gpt_oss",)


def draw_fields(family: str, number: int) -> Fields:
    """The `number`-th random `config.json` of a family; number 0 leaves all that may be left out to the defaults."""
    rng = np.random.default_rng([100 + FAMILIES.index(family), number])
    heads = int(rng.choice([2, 4]))
    fields: Fields = dict(
        model_type=family,
        vocab_size=64,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=int(rng.choice([1, 2, heads])),
        head_dim=int(rng.choice([4, 12])),
        num_experts_per_tok=int(rng.integers(1, 4)),
        max_position_embeddings=CONTEXT if number else 64,
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        tie_word_embeddings=bool(rng.integers(2)),
        sliding_window=int(rng.integers(1, 12)),
    )
    return fields | _OF_FAMILY[family](number, rng)


def _kinds(rng: np.random.Generator) -> list[str]:
    return [("sliding_attention", "full_attention")[int(rng.integers(2))] for _ in range(4)]


def _gpt_oss(number: int, rng: np.random.Generator) -> dict[str, Any]:
    fields: dict[str, Any] = dict(num_local_experts=int(rng.choice([3, 5])))
    if number == 0:
        return fields
    fields |= dict(swiglu_limit=float(rng.choice([0.5, 2.0])), attention_bias=bool(rng.integers(2)))
    fields |= dict(swiglu_alpha=1.3) if number % 3 == 1 else {}
    fields |= dict(layer_types=_kinds(rng)) if number % 2 else {}
    return fields | draw_rope(ROPES[number % 5], rng, new_spelling=number // 5 % 2 == 0)


_OF_FAMILY = {"gpt_oss": _gpt_oss}
