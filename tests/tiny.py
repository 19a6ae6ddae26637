"""Tiny checkpoints for tests: a config.json, random tensors of the names and shapes the tensor table asks for, and a
byte-level tokenizer trained on the spot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.tensor_table import tensor_table

CONTEXT = 96
STOP = 0  # the tokenizer's <|end|>

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}

_CORPUS = ["def add(a, b):\n    return a + b\n", "naïve café costs 5 €, 日本語 🙂", "the cat sat on the mat"]


def write_tiny(directory: Path, *, seed: int = 0, tokenizer: bool = True, **changes: Any) -> Path:
    """A whole checkpoint with `changes` to the config above; returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = CONFIG | changes
    write_json(directory / "config.json", fields)
    write_json(directory / "generation_config.json", {"eos_token_id": STOP})
    save_file(tiny_tensors(fields, seed), directory / "model.safetensors")
    if tokenizer:
        byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def tiny_tensors(fields: Mapping[str, Any] = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under their published names: a small embedding and large matrices, so that a greedy output depends
    on more than its last token and does not soon repeat itself."""
    random = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        gain = 0.4 if "embed" in name else 2.0
        return random.normal(0.0, gain * shape[-1] ** -0.5, shape).astype(np.float32)

    table = tensor_table(read_config(fields)).items()
    return {n: np.ones(t.shape, np.float32) if len(t.shape) == 1 else draw(n, t.shape) for n, t in table}


def byte_level_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """Every byte is a token, so any text can be encoded and characters may span tokens; id 0 is `<|end|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Mixtral's: a space is `▁`, unknown characters fall back to bytes, and a text's first space is dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "▁a", "▁ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
