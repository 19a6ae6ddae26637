"""Synthetic draft heads in the published formats, spelled out without the library's own tables, and a writer of the
archives that `torch.save` makes."""

import json
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from moespec_jax.config import DecoderConfig

Tensors = dict[str, np.ndarray]
Fields = dict[str, Any]

VOCAB, DRAFT_VOCAB, MODEL, FFN, HEADS, KV_HEADS, HEAD = 40, 12, 16, 24, 4, 2, 8
# The target's tokens of a reduced vocabulary.
IDS = np.asarray([0, 1, 3, 4, 7, 11, 12, 20, 21, 33, 38, 39])


def target(model_type: str = "qwen3_moe", layers: int = 8, hidden_size: int = MODEL) -> DecoderConfig:
    """A target whose boundaries by formula are 2, 4, 5."""
    return DecoderConfig(
        model_type=model_type,
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sparse_layers=(True,) * layers,
        sliding_windows=(0,) * layers,
    )


def eagle_fields(**changes: Any) -> Fields:
    """A config.json as EAGLE's repository publishes it; `num_hidden_layers` is one it does not mean."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": MODEL,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 40,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT_VOCAB,
    } | changes


def specforge_fields(ids: tuple[int, ...] = (1, 3, 5), **changes: Any) -> Fields:
    fields = eagle_fields(architectures=["LlamaForCausalLMEagle3"], num_hidden_layers=1, head_dim=HEAD)
    return fields | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(ids)}} | changes


def speculators_fields(
    ids: tuple[int, ...] | None = (2, 4, 6), layer: Mapping[str, Any] = {}, **changes: Any
) -> Fields:
    nested = eagle_fields(num_hidden_layers=1, head_dim=HEAD) | dict(layer)
    del nested["draft_vocab_size"]
    fields: Fields = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": DRAFT_VOCAB,
        "transformer_layer_config": nested,
    }
    if ids is not None:
        fields["eagle_aux_hidden_state_layer_ids"] = list(ids)
    return fields | changes


def head_tensors(
    dtype: Any = np.float32,
    width: int = MODEL,
    layers: int = 1,
    full: bool = False,
    extra: Mapping[str, tuple[int, ...]] = {},
) -> Tensors:
    """Random values under EAGLE's names. `width` is the target's; `full` has no vocabulary maps; `extra` are shapes by
    name."""
    random = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (MODEL, 3 * width),
        "norm.weight": (MODEL,),
        "lm_head.weight": (VOCAB if full else DRAFT_VOCAB, MODEL),
    }
    for i in range(layers):
        at, inputs = f"midlayer.{i}." if i else "midlayer.", MODEL if i else 2 * MODEL
        names = ["input_layernorm", "post_attention_layernorm"] + ([] if i else ["hidden_norm"])
        shapes |= {f"{at}{name}.weight": (MODEL,) for name in names}
        shapes |= {
            f"{at}self_attn.q_proj.weight": (HEADS * HEAD, inputs),
            f"{at}self_attn.k_proj.weight": (KV_HEADS * HEAD, inputs),
            f"{at}self_attn.v_proj.weight": (KV_HEADS * HEAD, inputs),
            f"{at}self_attn.o_proj.weight": (MODEL, HEADS * HEAD),
            f"{at}mlp.gate_proj.weight": (FFN, MODEL),
            f"{at}mlp.up_proj.weight": (FFN, MODEL),
            f"{at}mlp.down_proj.weight": (MODEL, FFN),
        }
    shapes |= dict(extra)
    tensors = {name: random.normal(size=shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}
    return tensors if full else tensors | vocabulary_maps(IDS)


def vocabulary_maps(ids: np.ndarray) -> Tensors:
    t2d = np.zeros(VOCAB, bool)
    t2d[ids] = True
    return {"d2t": (ids - np.arange(len(ids))).astype(np.int64), "t2d": t2d}


def renamed(tensors: Tensors) -> Tensors:
    """The same under the names of speculators."""
    numbered = {re.sub(r"^midlayer\.(?=[a-z])", "midlayer.0.", name): tensor for name, tensor in tensors.items()}
    return {name.replace("midlayer.", "layers."): tensor for name, tensor in numbered.items()}


def write_head(directory: Path, fields: Fields, tensors: Tensors, torch: bool = False) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    if torch:
        write_archive(directory / "pytorch_model.bin", tensors)
    else:
        save_file(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors"
        )
    return directory


def same_tree(a: Any, b: Any) -> bool:
    """Whether two trees are equal in structure, dtypes and every bit."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


_STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
    "float64": "DoubleStorage",
}


def write_archive(file: Path, tensors: Mapping[str, np.ndarray], program: bytes | None = None, **edit: Any) -> None:
    """What `torch.save(OrderedDict(tensors), file)` writes; transposed arrays become transposed views. `program`
    replaces the pickle; `edit` may set `compression` or `byteorder`."""
    with zipfile.ZipFile(file, "w", edit.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("head/data.pkl", state_dict_program(tensors) if program is None else program)
        archive.writestr("head/byteorder", edit.get("byteorder", "little"))
        for number, tensor in enumerate(tensors.values()):
            flat = tensor if tensor.flags.c_contiguous else tensor.T
            archive.writestr(f"head/data/{number}", np.ascontiguousarray(flat).tobytes())
        archive.writestr("head/version", "3\n")


def state_dict_program(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The pickle of an ordered dictionary of tensors, protocol 2."""
    items = b""
    for number, (name, tensor) in enumerate(tensors.items()):
        stride = tuple(step // tensor.itemsize for step in tensor.strides)
        kind = _STORAGES[str(tensor.dtype)]
        items += _text(name) + tensor_program(kind, str(number), tensor.size, 0, tensor.shape, stride)
    version = b"}" + _text("_metadata") + _global("collections", "OrderedDict") + b")R" + b"s"
    return b"\x80\x02" + _global("collections", "OrderedDict") + b")R" + b"q\x00(" + items + b"u" + version + b"b."


def tensor_program(
    kind: str, key: str, size: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """The instructions that leave one tensor on the stack."""
    storage = b"(" + _text("storage") + _global("torch", kind) + _text(key) + _text("cpu") + _number(size) + b"tQ"
    arguments = storage + _number(offset) + _numbers(shape) + _numbers(stride) + b"\x89"
    hooks = _global("collections", "OrderedDict") + b")R"
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + hooks + b"tR"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _global(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()
