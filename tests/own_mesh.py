"""Greedy tokens of a tiny pair, and of a DSpark head, on one device and on meshes that a caller made: a program of its
own, for the number of devices is settled at its start. Prints the tokens of each as JSON."""

import json
import tempfile
from pathlib import Path

import dflash_oracle as oracle
import jax
import numpy as np
from dflash_files import speculators_fields, write_block_head
from jax.sharding import Mesh
from tiny_pair import write_pair

from moespec_jax.checkpoint.read import load_config
from moespec_jax.config import TreeConfig
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.load import load


def main() -> None:
    """Decode with a draft head on every mesh, and with a DSpark head on some."""
    some = np.array(jax.devices())[[6, 3, 5, 0]]
    auto = jax.sharding.AxisType.Auto
    meshes = [
        None,
        Mesh(some.reshape(2, 2), ("tensor", "expert")),
        Mesh(some[:2], ("expert",)),
        jax.make_mesh((2, 2, 1), ("tensor", "data", "pipeline"), axis_types=(auto,) * 3),
    ]
    found = []
    with tempfile.TemporaryDirectory() as directory:
        flags = write_pair(Path(directory), 8)
        for mesh in meshes:
            model = load(flags[1], flags[3], mesh=mesh, backend=BACKENDS["slots"])
            result = model.generate([[5, 6, 7], [9]], max_new_tokens=8, tree=TreeConfig(2, 2, 6), ignore_eos=True)
            found.append([prompt.token_ids for prompt in result.prompts])
        for mesh in meshes[1::2]:
            model = load(flags[1], block_head(Path(directory), flags[1]), mesh=mesh, backend=BACKENDS["slots"])
            result = model.generate([[5, 6, 7], [9]], max_new_tokens=8, ignore_eos=True)
            found.append([prompt.token_ids for prompt in result.prompts])
    print(json.dumps(found))


def block_head(directory: Path, target: str) -> Path:
    """A random DSpark head that shares the target's output matrix."""
    fields = oracle.VARIANTS["vanilla"] | {"draft_vocab_size": 320, "boundaries": (1, 2, 3)}
    config = oracle.config_for(load_config(Path(target)), **fields)
    head = oracle.head_of(config)
    return write_block_head(directory / "block", speculators_fields(config), config, head, lm_head__weight=None)


if __name__ == "__main__":
    main()
