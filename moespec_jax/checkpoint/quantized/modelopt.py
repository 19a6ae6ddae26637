"""NVIDIA ModelOpt's checkpoints: `quant_algo` in `quantization_config`, or in a `hf_quant_config.json` beside it."""

from moespec_jax.checkpoint.config_fields import Fields, section, shown
from moespec_jax.checkpoint.quantized.fp4 import nvfp4_scheme
from moespec_jax.checkpoint.quantized.fp8 import fp8_scheme
from moespec_jax.checkpoint.quantized.scheme import ROW, WHOLE, Format, Scheme
from moespec_jax.errors import UnsupportedConfig

_SCALE = "weight_scale"
_NVFP4 = nvfp4_scheme("weight", _SCALE, "weight_scale_2", divides=False)
_SCHEMES: dict[str, Scheme] = {
    "FP8": fp8_scheme(_SCALE, WHOLE),
    "FP8_PER_CHANNEL_PER_TOKEN": fp8_scheme(_SCALE, ROW),
    "FP8_PB_WO": fp8_scheme(_SCALE, (128, 128)),
    "MXFP8": fp8_scheme(_SCALE, (1, 32)),
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
}


def read_modelopt(fields: Fields) -> Format:
    """Read a `quantization_config` of the method modelopt.

    Raises:
        UnsupportedConfig: `quant_algo` is not supported.
    """
    algorithm = (section(fields, "quantization") or fields).get("quant_algo")
    if algorithm is None:  # the key/value cache alone is quantized
        return Format("ModelOpt", lambda module: ())
    scheme = _SCHEMES.get(str(algorithm).upper())
    if scheme is None:
        known = ", ".join(_SCHEMES)
        raise UnsupportedConfig(f"quant_algo {shown(algorithm)} is not supported: expected one of {known}")
    return Format(f"{str(algorithm).upper()} (ModelOpt)", lambda module: (scheme,))
