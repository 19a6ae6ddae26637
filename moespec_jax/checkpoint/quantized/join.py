"""Joining of the stored components of quantized weights: each weight becomes one entry, with the name and the shape
that the tensor table has for it."""

import re
from collections.abc import Mapping

from moespec_jax.checkpoint.quantized.scheme import Component, Format, Scheme
from moespec_jax.checkpoint.shards import Entry
from moespec_jax.checkpoint.tensor_table import Tensor

# Tensors of any format by which activations and caches are quantized, which they are not here.
_OF_ACTIVATIONS = re.compile(
    r".+\.(?:(?:input|output|activation|[qkv]|kv|kv_cache|prob)_(?:scale|zero_point|scaling_factor)|input_global_scale)"
)

Problems = dict[str, list[str]]


def join_components(form: Format, entries: dict[str, Entry], table: Mapping[str, Tensor]) -> Problems:
    """Replace the components of each quantized weight by one entry, and remove what concerns activations alone.

    Returns:
        Components that are missing, misshapen or of another dtype than expected, by kind.
    """
    problems: Problems = {}
    for name, tensor in table.items():
        base = name.removesuffix("weight")
        if base == name or len(tensor.shape) != 2:
            continue
        schemes = [one for one in form.schemes(base[:-1]) if _is_stored(one, base, entries, tensor)]
        if schemes:
            scheme = next((one for one in schemes if not _missing(one, base, entries, tensor)), schemes[0])
            _join(scheme, base, entries, tensor, problems)
    for name in [name for name in entries if _OF_ACTIVATIONS.fullmatch(name)]:
        del entries[name]
    return problems


def _is_stored(scheme: Scheme, base: str, entries: Mapping[str, Entry], tensor: Tensor) -> bool:
    """Test whether codes of a scheme are stored, which plain weights are not."""
    codes = entries.get(base + scheme.codes)
    return codes is not None and codes.dtype in scheme.components(tensor.shape)[scheme.codes].dtypes


def _missing(scheme: Scheme, base: str, entries: Mapping[str, Entry], tensor: Tensor) -> list[str]:
    """List required components that are not stored."""
    components = scheme.components(tensor.shape)
    return [
        base + suffix for suffix, component in components.items() if component.required and base + suffix not in entries
    ]


def _join(scheme: Scheme, base: str, entries: dict[str, Entry], tensor: Tensor, problems: Problems) -> None:
    """Replace the components of one weight; list what is wrong with them."""
    components = scheme.components(tensor.shape)
    codes = entries[base + scheme.codes]
    if missing := _missing(scheme, base, entries, tensor):
        problems.setdefault("missing beside quantized weights", []).extend(
            f"{name} ({codes.file.name})" for name in missing
        )
    stored = {suffix: entries.pop(base + suffix) for suffix in components if base + suffix in entries}
    for suffix, entry in stored.items():
        _check_component(base + suffix, components[suffix], entry, problems)
    if base + "weight" in entries:
        problems.setdefault("doubly assigned", []).append(f"{base}weight (also as {base}{scheme.codes})")
    # The codes decide the order of reading; the other components may be in other files.
    entries[base + "weight"] = codes._replace(
        shape=tensor.shape, dtype="F32", components=stored, combine=scheme.dequantize
    )


def _check_component(name: str, component: Component, entry: Entry, problems: Problems) -> None:
    if entry.dtype not in component.dtypes:
        problems.setdefault(f"not {', '.join(component.dtypes)}", []).append(
            f"{name} ({entry.dtype} in {entry.file.name})"
        )
    if entry.shape not in component.shapes:
        problems.setdefault("misshapen", []).append(
            f"{name} (expected {list(component.shapes[0])}, got {list(entry.shape)} in {entry.file.name})"
        )
