"""Checkpoints in and out: `config.json`, tensor names, safetensors, orbax, tokenizers, the Hugging Face hub. Private: see `moespec_jax`."""
