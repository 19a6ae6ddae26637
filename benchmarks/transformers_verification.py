"""A verifying forward pass as transformers would run it (torch): a tree of tokens behind a cached prompt."""

import time
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers

from moespec_jax.measure.published_shapes import MODELS


def tree_passes(model: str, layers: int, trees: list[str], dtype: str, prompt: int) -> dict[str, Callable[[], float]]:
    """For every tree (size/depth/top-k) a function that runs one pass and returns its milliseconds.

    All nodes are the root's children: the mask costs the same as any other tree's.
    """
    fields = {name: value for name, value in MODELS[model].items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(MODELS[model]["model_type"], **(fields | {"num_hidden_layers": layers}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        network(torch.ones((1, prompt), dtype=torch.long, device=device), past_key_values=cache, logits_to_keep=1)
    return {name: one_pass(network, cache, int(name.split("/")[0]), prompt, device) for name in trees}


def one_pass(network: Any, cache: Any, size: int, prompt: int, device: str) -> Callable[[], float]:
    """One tree of `size` nodes; its rows are taken out of the cache again."""
    tokens = torch.arange(1, size + 1, device=device)[None]
    positions = torch.full((1, size), prompt + 1, device=device)
    positions[0, 0] = prompt
    hidden = ~torch.eye(size, dtype=torch.bool, device=device)
    hidden[:, 0] = False
    mask = torch.zeros((1, 1, size, prompt + size), dtype=network.dtype, device=device)
    mask[0, 0, :, prompt:].masked_fill_(hidden, torch.finfo(network.dtype).min)

    def run() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            network(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        if device == "cuda":
            torch.cuda.synchronize()
        spent = time.perf_counter() - started
        cache.crop(prompt)
        return spent * 1e3

    return run
