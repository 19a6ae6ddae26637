"""Tiny transformers models with random settings and weights, written to disk as a published checkpoint would be.

A drawn model is a plain `config.json` (in the old or the new spelling of the rotary settings): transformers and we read
the same file.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "qwen2_moe")
ROPES = ("default", "linear", "dynamic", "yarn", "llama3")
TOKENS, CONTEXT = 20, 16  # dynamic scaling only acts beyond the context

Fields = dict[str, Any]


def draw_fields(family: str, number: int) -> Fields:
    """The `number`-th random `config.json` of a family; rotary scalings and their spellings come in turn."""
    rng = np.random.default_rng([FAMILIES.index(family), number])
    heads = int(rng.choice([2, 4]))
    kv_heads = int(rng.choice([1, 2, heads]))
    head_dim = 8 if family == "olmoe" else int(rng.choice([4, 12]))
    fields: Fields = dict(
        model_type=family,
        vocab_size=64,
        hidden_size=heads * 8 if family == "olmoe" else 24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts_per_tok=int(rng.integers(1, 4)),
        max_position_embeddings=CONTEXT,
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        hidden_act=str(rng.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"])),
        tie_word_embeddings=bool(rng.integers(2)),
    )
    fields["num_local_experts" if family == "mixtral" else "num_experts"] = int(rng.choice([3, 5]))
    _draw_family_fields(fields, rng)
    return fields | draw_rope(ROPES[number % 5], rng, new_spelling=number // 5 % 2 == 0)


def _draw_family_fields(fields: Fields, rng: np.random.Generator) -> None:
    family = fields["model_type"]
    coin = lambda: bool(rng.integers(2))  # noqa: E731
    if family != "mixtral":
        fields["norm_topk_prob"] = coin()
    if family in ("olmoe", "qwen3_moe"):
        fields["attention_bias"] = coin()
    if family == "olmoe":
        del fields["head_dim"]
        fields["clip_qkv"] = float(rng.choice([0.3, 1.0])) if coin() else None
    if family == "mixtral":
        fields["sliding_window"] = int(rng.integers(1, 12)) if coin() else None
    if family in ("qwen3_moe", "qwen2_moe"):
        fields["moe_intermediate_size"] = 12
        fields["use_sliding_window"] = coin()
        fields["sliding_window"] = int(rng.integers(1, 12))
        fields["max_window_layers"] = int(rng.integers(0, 3))
        fields["mlp_only_layers"] = [[], [0], [1]][int(rng.integers(3))]
        fields["decoder_sparse_step"] = int(rng.integers(1, 3))
    if family == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = 28
        fields["qkv_bias"] = coin()
        if fields["use_sliding_window"] and coin():
            kinds = ["sliding_attention", "full_attention"]
            fields["layer_types"] = [kinds[int(rng.integers(2))] for _ in range(2)]


def draw_rope(rope_type: str, rng: np.random.Generator, new_spelling: bool) -> Fields:
    """Rotary settings of one type: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    theta = float(rng.choice([100.0, 10_000.0, 500_000.0]))
    scaling: Fields = {}
    if rope_type != "default":
        scaling["factor"] = float(rng.choice([1.0, 2.0, 3.5, 8.0]))
    if rope_type == "yarn":
        scaling |= dict(original_max_position_embeddings=int(rng.choice([16, 64, 1024])))
        scaling |= [
            {},
            dict(attention_factor=0.7),
            dict(beta_fast=16.0, beta_slow=2.0, truncate=False),
            dict(mscale=0.7, mscale_all_dim=1.3),
        ][int(rng.integers(4))]
    if rope_type == "llama3":
        scaling |= dict(original_max_position_embeddings=int(rng.choice([16, 64, 1024])))
        scaling |= dict(low_freq_factor=1.0, high_freq_factor=float(rng.choice([2.0, 4.0])))
    if new_spelling:
        return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}
    if rope_type == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    return {"rope_theta": theta, "rope_scaling": {str(rng.choice(["type", "rope_type"])): rope_type, **scaling}}


def write_checkpoint(directory: Path, fields: Fields, seed: int) -> Any:
    """Write `config.json` as given and random float32 weights; returns the transformers model that holds them."""
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(fields, indent=1)
    (directory / "config.json").write_text(text)
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomize(name, parameter, generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.empty(buffer.shape).normal_(generator=generator))
    model.eval().save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    (directory / "config.json").write_text(text)
    return model


def _randomize(name: str, parameter: Any, generator: Any) -> None:
    """Matrices of about unit gain, routers sharp enough to decide, norms around 1, biases around 0."""
    values = parameter.new_empty(parameter.shape).normal_(generator=generator)
    if "norm" in name:
        parameter.copy_(1.0 + 0.2 * values)
    elif parameter.dim() == 1:
        parameter.copy_(0.3 * values)
    else:
        gain = 2.0 if name.endswith("gate.weight") else 1.0
        parameter.copy_(gain * values * parameter.shape[-1] ** -0.5)


def hf_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of all positions, one forward pass without a cache."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits.numpy()


def hf_greedy(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """`new` greedy tokens after each prompt, the prompts as one batch padded on the left, with a cache."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return out[:, longest:].tolist()
