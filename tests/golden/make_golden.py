"""Makes the checkpoints and expectations of this directory: `python tests/golden/make_golden.py [FAMILY ...]`; needs
torch.

One tiny random checkpoint a family, as transformers writes it, with what transformers computes from it.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from hf_models import Fields, draw_rope, hf_greedy, hf_logits, write_checkpoint  # noqa: E402

NEW_TOKENS, PROMPT_LENGTHS = 48, (7, 3, 12)

COMMON: Fields = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
QWEN: Fields = dict(moe_intermediate_size=8, num_experts=5, use_sliding_window=False)
FAMILIES: dict[str, Fields] = {
    "olmoe": dict(num_experts=5, norm_topk_prob=False, clip_qkv=1.5),
    "qwen3_moe": QWEN | dict(head_dim=8, norm_topk_prob=True, attention_bias=True),
    "mixtral": dict(num_local_experts=4, sliding_window=6, head_dim=4),
    "qwen2_moe": QWEN
    | dict(mlp_only_layers=[0], shared_expert_intermediate_size=8, use_sliding_window=True, sliding_window=5),
    "gpt_oss": dict(num_local_experts=4, sliding_window=6, head_dim=4, swiglu_limit=0.8),
    "glm4_moe": dict(n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, routed_scaling_factor=1.8)
    | dict(moe_intermediate_size=8, first_k_dense_replace=1, attention_bias=True, use_qk_norm=True, head_dim=8),
    "llama4_text": dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=20, head_dim=4)
    | dict(attention_chunk_size=5, no_rope_layer_interval=2, interleave_moe_layer_step=2)
    | dict(floor_scale=3, attn_scale=0.4),
    "phimoe": dict(num_local_experts=4, attention_bias=True, lm_head_bias=True, sliding_window=None),
    "flex_olmo": dict(num_experts=5, pad_token_id=None),
    "granitemoe": dict(num_local_experts=5, embedding_multiplier=12.0, attention_multiplier=0.25)
    | dict(residual_multiplier=0.22, logits_scaling=1.5),
}
ROPES = {"qwen3_moe": "yarn", "mixtral": "llama3", "qwen2_moe": "linear", "gpt_oss": "yarn", "llama4_text": "llama3"}


def make(family: str, seed: int) -> None:
    """Write `<family>/config.json`, `model.safetensors` and `expected.npz`; the rotary settings in both spellings."""
    rng = np.random.default_rng(seed)
    rope = draw_rope(ROPES.get(family, "default"), rng, new_spelling=bool(seed % 2))
    model = write_checkpoint(HERE / family, {"model_type": family, **COMMON, **FAMILIES[family], **rope}, seed)
    ids = rng.integers(0, COMMON["vocab_size"], (3, 20)).astype(np.int32)
    logits = hf_logits(model, ids)
    prompts = [row[:length].tolist() for row, length in zip(ids, PROMPT_LENGTHS, strict=True)]
    # Of Llama 4, transformers scales queries by positions that count padding.
    batches = [[prompt] for prompt in prompts] if family == "llama4_text" else [prompts]
    greedy = np.array([row for batch in batches for row in hf_greedy(model, batch, NEW_TOKENS)], np.int32)
    expected = dict(ids=ids, logits=logits, prompt_lengths=np.array(PROMPT_LENGTHS, np.int32), greedy=greedy)
    np.savez_compressed(HERE / family / "expected.npz", **expected)
    distinct = len(set(greedy.ravel().tolist()))
    print(f"{family}: logits of standard deviation {logits.std():.2f}, {distinct} distinct tokens")


if __name__ == "__main__":
    for number, name in enumerate(FAMILIES):
        if name in (sys.argv[1:] or FAMILIES):
            make(name, seed=number)
