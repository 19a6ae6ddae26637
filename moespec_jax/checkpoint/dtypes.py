"""Dtypes of stored tensors, by their codes in safetensors."""

FLOAT_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Of tensors that are not parameters: the vocabulary maps of a draft head.
INTEGER_CODES = {"I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool"}
CODES = FLOAT_CODES | INTEGER_CODES
# Of components of quantized weights.
COMPONENT_CODES = CODES | {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8",
}

FLOAT_DTYPES = tuple(FLOAT_CODES.values())
INTEGER_DTYPES = tuple(INTEGER_CODES.values())
