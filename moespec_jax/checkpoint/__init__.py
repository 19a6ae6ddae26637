"""Reading and writing of checkpoints: config.json, tensor names, safetensors, orbax, tokenizer, hub. Private."""
