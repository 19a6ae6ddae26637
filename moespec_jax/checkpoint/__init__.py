"""Checkpoints in and out: config.json, tensor names, safetensors, orbax, tokenizer, hub. Private."""
