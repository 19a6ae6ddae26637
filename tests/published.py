"""Published checkpoints of random tensors, cut into files as one likes, and the comparison of loaded parameters."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from hf_models import Fields
from safetensors.numpy import save_file

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.nn.decoder import Decoder

Tensors = dict[str, np.ndarray]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def draw_tensors(fields: Fields, dtype: str = "float32") -> Tensors:
    """Random values, different everywhere, under every name the tensor table asks for."""
    rng = np.random.default_rng(3)
    table = tensor_table(read_config(fields))
    return {name: rng.standard_normal(t.shape, np.float32).astype(DTYPES[dtype]) for name, t in table.items()}


def write(directory: Path, fields: Fields, tensors: Tensors, shards: int = 1, index: bool = False) -> Path:
    """A checkpoint cut into shards of alternating tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    weight_map = {}
    for i in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::shards]}
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory


def same(a: Decoder, b: Decoder) -> bool:
    """Whether two trees are equal in structure, dtypes and every bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )
