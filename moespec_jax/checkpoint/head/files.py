"""The two files of a draft head, replaced together."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moespec_jax.checkpoint.shards import INDEX, SINGLE_FILE
from moespec_jax.files import replacing, write_json, writing


def write_files(directory: Path, tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> None:
    """Write both files under temporary names, then rename them. Two files cannot be replaced atomically: the old config
    is removed first and the new one renamed last, so that an interruption leaves a directory that does not load, never
    a mixture."""
    directory.mkdir(parents=True, exist_ok=True)
    weights, config = directory / SINGLE_FILE, directory / "config.json"
    # A directory: safetensors writes a private file of its own beside the one it is asked for, and renames it. A killed
    # process leaves it; the next write removes it.
    place = directory / ".draft.incomplete"
    temporary = place / SINGLE_FILE
    shutil.rmtree(place, ignore_errors=True)
    try:
        with writing(weights):
            place.mkdir()
            # The mode of the private file is not that of a new file here.
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
            temporary.chmod(mode)
        with replacing(config) as temporary_config:
            write_json(temporary_config, fields)
            for old in (config, directory / INDEX):
                old.unlink(missing_ok=True)
            os.replace(temporary, weights)
    finally:
        shutil.rmtree(place, ignore_errors=True)
