"""The format of a checkpoint's quantized weights, as its `config.json` states it."""

from collections.abc import Callable
from pathlib import Path

from moespec_jax.checkpoint.config_fields import Fields, section, shown
from moespec_jax.checkpoint.quantized.compressed_tensors import read_compressed_tensors
from moespec_jax.checkpoint.quantized.fp4 import read_mxfp4
from moespec_jax.checkpoint.quantized.fp8 import read_fbgemm, read_fp8
from moespec_jax.checkpoint.quantized.modelopt import read_modelopt
from moespec_jax.checkpoint.quantized.packed_words import read_awq, read_gptq
from moespec_jax.checkpoint.quantized.scheme import Format
from moespec_jax.checkpoint.wrappers import text_fields
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.files import read_json

# Readers of `quantization_config`, by its quant_method.
METHODS: dict[str, Callable[[Fields], Format]] = {
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm,
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
    "mxfp4": read_mxfp4,
    "gptq": read_gptq,
    "awq": read_awq,
}
# Fields of config.json with a description of quantized weights; the second is that of old compressed-tensors.
QUANTIZATION_FIELDS = ("quantization_config", "compression_config")


def read_format(fields: Fields) -> Format | None:
    """Read the format that a `config.json` states; None for plain weights.

    Raises:
        UnsupportedConfig: the format, or one of its settings, is not supported; the message names it.
    """
    found = next((name for name in QUANTIZATION_FIELDS if fields.get(name) is not None), None)
    if found is None:
        return None
    described = section(fields, found)
    method = described.get("quant_method", "compressed-tensors" if found == QUANTIZATION_FIELDS[1] else None)
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        raise UnsupportedConfig(
            f"{found} with quant_method {shown(method)} is not supported: expected the unquantized checkpoint, or a"
            f" quant_method among {known}"
        )
    try:
        return METHODS[method](described)
    except UnsupportedConfig as error:
        raise UnsupportedConfig(f"{found} is not supported: {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as wrong:
        raise UnsupportedConfig(f"{found} has a field of the wrong type: {wrong}") from None


def stored_format(directory: Path) -> Format | None:
    """Read the format of a directory's weights from its `config.json` or, of ModelOpt, `hf_quant_config.json`.

    Raises:
        CheckpointError: the format is not supported.
    """
    file, beside = directory / "config.json", directory / "hf_quant_config.json"
    fields = text_fields(read_json(file)) if file.exists() else {}
    if all(fields.get(name) is None for name in QUANTIZATION_FIELDS) and beside.exists():
        file, fields = beside, {QUANTIZATION_FIELDS[0]: {"quant_method": "modelopt"} | read_json(beside)}
    try:
        return read_format(fields)
    except UnsupportedConfig as error:
        raise CheckpointError(f"{error} ({file})") from None
