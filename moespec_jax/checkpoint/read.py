"""Reading of checkpoints: every name, shape and dtype is checked before any weights are read, then tensors are read one
by one into their final place."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moespec_jax.checkpoint.dtypes import FLOAT_CODES
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.leaves import Source, load_source
from moespec_jax.checkpoint.orbax_io import is_orbax, open_orbax
from moespec_jax.checkpoint.placement import Placement
from moespec_jax.checkpoint.quantized.detect import stored_format
from moespec_jax.checkpoint.quantized.fused import join_fused
from moespec_jax.checkpoint.quantized.join import Problems, join_components
from moespec_jax.checkpoint.shards import Headers, is_same, read_headers, read_tensors
from moespec_jax.checkpoint.spellings import EMBEDDING, LM_HEAD, unify_names
from moespec_jax.checkpoint.tensor_table import (
    Tensor,
    check_expert_count,
    is_ignorable,
    raise_problems,
    table_problems,
    tensor_table,
)
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.files import read_json
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import Quantization


def load_config(directory: Path) -> DecoderConfig:
    """Read the decoder's settings from the `config.json` of a directory.

    Raises:
        CheckpointError: as `check_no_adapter` and `read_config_file`.
    """
    check_no_adapter(directory)
    return read_config_file(directory / "config.json")


def check_no_adapter(directory: Path) -> None:
    """Refuse a directory with an adapter: without it, its weights would be those of another model.

    Raises:
        CheckpointError: there is a PEFT adapter.
    """
    file = directory / "adapter_config.json"
    if file.exists():
        raise CheckpointError(
            f"expected a model without an adapter; {file} is a PEFT adapter's: merge it into its base model first"
            " (PEFT's merge_and_unload, then save_pretrained), and load the result"
        )


def read_config_file(file: Path) -> DecoderConfig:
    """Read the decoder's settings from a `config.json`.

    Raises:
        CheckpointError: the file is not a JSON object, or `read_config` refuses it.
    """
    try:
        return read_config(read_json(file))
    except UnsupportedConfig as error:
        raise CheckpointError(f"{error} ({file})") from None


def read_architectures(directory: Path) -> list[str]:
    """Read `architectures` of a checkpoint's `config.json`; empty where it has none."""
    architectures = read_json(directory / "config.json").get("architectures")
    return architectures if isinstance(architectures, list) else []


def load_parameters(
    directory: Path,
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    placement: Placement | None = None,
    progress: bool = False,
    quantization: Quantization | None = None,
) -> Decoder:
    """Load the parameters of a directory of safetensors or orbax.

    Raises:
        CheckpointError: as `open_source`, or a tensor is damaged.
    """
    source = open_source(directory, config)
    return load_source(source, config, backend, dtype, placement, progress, quantization)


def open_source(directory: Path, config: DecoderConfig) -> Source:
    """Open a directory of safetensors or orbax, checked against the tensor table.

    Raises:
        CheckpointError: as `open_safetensors` and `open_orbax`.
    """
    return open_orbax(directory, config) if is_orbax(directory) else open_safetensors(directory, config)


def open_safetensors(directory: Path, config: DecoderConfig) -> Source:
    """Open a directory of safetensors, checked by their headers. Quantized weights are dequantized as they are read.

    Raises:
        CheckpointError: no safetensors, a bad index, a shard that is missing, truncated or not safetensors; weights
            quantized in a format that is not supported; tensors that are unknown, missing, misshapen, doubly assigned
            or of an unsupported dtype, all in one message; or an output matrix that is not the embedding with which
            config.json ties it.
    """
    quantized = stored_format(directory)
    headers = read_headers(directory)
    problems: Problems = {} if quantized is None else join_fused(config, headers.entries)
    headers, misshapen = unify_names(config, headers)
    check_expert_count(config, len(headers.entries), directory)
    table = tensor_table(config)
    problems |= {} if quantized is None else join_components(quantized, headers.entries, table)
    problems["misshapen"] = [*misshapen, *problems.get("misshapen", [])]
    _check_headers(config, table, headers, problems, directory)
    _check_tied(config, headers, directory)
    entries = {name: headers.entries[name] for name in table}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_tensors({name: entries[name] for name in names})

    return Source({name: jnp.dtype(FLOAT_CODES[entry.dtype]) for name, entry in entries.items()}, read, table)


def _check_headers(
    config: DecoderConfig, table: Mapping[str, Tensor], headers: Headers, known: Problems, where: Path
) -> None:
    """Compare headers with the tensor table, collecting all differences before raising, with those that are known."""
    shapes = {name: entry.shape for name, entry in headers.entries.items()}
    problems = table_problems(table, shapes, lambda name: is_ignorable(config, name))
    problems["doubly assigned"] = headers.duplicates
    for kind, names in known.items():
        problems[kind] = [*problems.get(kind, []), *names]
    problems["not F32, F16 or BF16"] = [
        f"{name} ({headers.entries[name].dtype})"
        for name in table
        if name in headers.entries and headers.entries[name].dtype not in FLOAT_CODES
    ]
    raise_problems(f"the tensors of {config.model_type}", problems, where)


def _check_tied(config: DecoderConfig, headers: Headers, where: Path) -> None:
    """Refuse a stored output matrix of its own beside tie_word_embeddings true, which excludes one."""
    output = headers.entries.get(LM_HEAD)
    if config.tie_word_embeddings and output is not None and not is_same(output, headers.entries[EMBEDDING]):
        raise CheckpointError(
            f"expected {LM_HEAD} to equal {EMBEDDING}, as tie_word_embeddings is true; they differ: to use it, set"
            f" tie_word_embeddings to false in config.json of {where}"
        )
