"""Dtypes of stored tensors, by their codes in safetensors."""

FLOAT_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Of tensors that are not parameters: the vocabulary maps of a draft head.
INTEGER_CODES = {"I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool"}
CODES = FLOAT_CODES | INTEGER_CODES

FLOAT_DTYPES = tuple(FLOAT_CODES.values())
INTEGER_DTYPES = tuple(INTEGER_CODES.values())
