"""Trees of JSON values and tensors: the structure goes into a JSON manifest, the tensors into a safetensors file.

Decoding trusts nothing: every tensor is handed out once, so that no two places of the result share memory, depth is bounded,
and markers, keys and numbers are checked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressm.errors import CheckpointError

# A dict with exactly one of these keys is a marker; dicts of the user that would look like one are written as pairs.
TENSOR, TUPLE, PAIRS, NUMBER, FLOATS = "!tensor", "!tuple", "!dict", "!float", "!floats"
MARKERS = frozenset({TENSOR, TUPLE, PAIRS, NUMBER, FLOATS})
MANY_FLOATS = 64  # lists of so many floats become tensors: spectra would fill the header, which safetensors limits
MAX_DEPTH = 100
MAX_BITS = 4096  # of an int; Python refuses to parse more than 4300 digits


def encode(tree: Any, where: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """JSON for a tree of None, bool, int, float, str, list, tuple, dict and tensors.

    Args:
        tree: the tree, at most 100 levels deep.
        where: name of this node, also the name under which a tensor is stored.
        tensors: receives the tensors.
        depth: levels above this node.

    Raises:
        CheckpointError: something else is in the tree; names where.
    """
    if tree is None or isinstance(tree, bool | str):
        return tree
    if isinstance(tree, Tensor):
        return {TENSOR: _store(tree, where, tensors)}
    if type(tree) is int and tree.bit_length() <= MAX_BITS:
        return tree
    if type(tree) is float:
        return tree if math.isfinite(tree) else {NUMBER: repr(tree)}
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where[:80]}...: nested deeper than {MAX_DEPTH} levels, expected a flatter tree")
    if type(tree) is list and len(tree) >= MANY_FLOATS and all(type(value) is float for value in tree):
        return {FLOATS: _store(torch.tensor(tree, dtype=torch.float64, device="cpu"), where, tensors)}
    if isinstance(tree, list):
        return [encode(value, f"{where}/{i}", tensors, depth + 1) for i, value in enumerate(tree)]
    if type(tree) is tuple:
        return {TUPLE: [encode(value, f"{where}/{i}", tensors, depth + 1) for i, value in enumerate(tree)]}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) for key in tree) and not MARKERS & tree.keys():
            return {key: encode(value, f"{where}/{key}", tensors, depth + 1) for key, value in tree.items()}
        if all(isinstance(key, str | int) and not isinstance(key, bool) for key in tree):
            return {PAIRS: [[key, encode(value, f"{where}/{key}", tensors, depth + 1)] for key, value in tree.items()]}
        raise CheckpointError(f"{where}: a dict key is neither str nor int, expected JSON values and tensors")
    got = f"an int of {tree.bit_length()} bits" if type(tree) is int else type(tree).__name__
    raise CheckpointError(
        f"{where}: got {got}, expected None, bool, int (up to {MAX_BITS} bits), float, str, list, tuple, dict or torch.Tensor"
    )


def _store(tensor: Tensor, where: str, tensors: dict[str, Tensor]) -> str:
    name = where if where.isascii() else ascii(where)  # a str that is not valid Unicode cannot be written
    key, again = name, 1
    while key in tensors:  # {"a/b": x, "a": {"b": y}} and {1: x, "1": y} lead to the same name
        key, again = f"{name}#{again}", again + 1
    tensors[key] = tensor
    return key


def decode(node: Any, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """The inverse of :func:`encode`.

    Args:
        node: what ``encode`` returned.
        tensors: by name; each that is used is taken out.
        depth: levels above this node.

    Raises:
        CheckpointError: a tensor is missing or named twice, a marker is malformed, or the tree is too deep.
    """
    if not isinstance(node, list | dict):
        return node
    if depth > MAX_DEPTH:
        raise CheckpointError(f"manifest: nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, list):
        return [decode(value, tensors, depth + 1) for value in node]
    if len(node) != 1 or not MARKERS & node.keys():
        return {key: decode(value, tensors, depth + 1) for key, value in node.items()}
    ((marker, value),) = node.items()
    if marker == TUPLE and isinstance(value, list):
        return tuple(decode(item, tensors, depth + 1) for item in value)
    if marker == NUMBER and value in ("nan", "inf", "-inf"):
        return float(value)
    if marker == PAIRS and isinstance(value, list) and all(_is_pair(item) for item in value):
        result = {key: decode(item, tensors, depth + 1) for key, item in value}
        if len(result) == len(value):
            return result
    if marker in (TENSOR, FLOATS) and isinstance(value, str) and value in tensors:
        if marker == TENSOR:
            return tensors.pop(value)
        if tensors[value].dtype == torch.float64 and tensors[value].dim() == 1:
            return tensors.pop(value).tolist()
    raise CheckpointError(f"manifest: malformed entry {marker}: {str(value)[:80]!r}")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str | int) and not isinstance(item[0], bool)


@dataclass(frozen=True)
class Leaf:
    """Stands for a tensor in a tree."""

    name: str


def split(tree: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Like :func:`encode`, for memory: a copy of a tree of any values with a Leaf for every tensor."""
    if isinstance(tree, Tensor):
        return Leaf(_store(tree, where, tensors))
    if isinstance(tree, Mapping):
        return {key: split(value, f"{where}/{key}", tensors) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(split(value, f"{where}/{i}", tensors) for i, value in enumerate(tree))
    return copy.deepcopy(tree)


def join(tree: Any, get: Callable[[str], Any]) -> Any:
    """The inverse of :func:`split`, with tensors as ``get`` gives them by name; everything else is a copy."""
    if isinstance(tree, Leaf):
        return get(tree.name)
    if isinstance(tree, dict):
        return {key: join(value, get) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(join(value, get) for value in tree)
    return copy.deepcopy(tree)


def to_storable(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors as safetensors takes them (CPU, contiguous, no shared memory), and the names of complex ones.

    Complex tensors become real ones with a last axis of two.

    Raises:
        CheckpointError: a sparse, quantized or meta tensor.
    """
    result: dict[str, Tensor] = {}
    complex_names, seen = [], set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
            raise CheckpointError(f"{name}: got a {kind} tensor, expected a dense one")
        value = tensor.detach()
        if value.is_complex():
            complex_names.append(name)
            value = torch.view_as_real(value.resolve_conj())
        value = value.resolve_neg().cpu().contiguous()
        key = value.untyped_storage().data_ptr()
        if key in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result, complex_names


def from_storable(tensors: dict[str, Tensor], complex_names: Any) -> dict[str, Tensor]:
    """The inverse of :func:`to_storable`.

    Raises:
        CheckpointError: the names are no list of distinct tensors with a last axis of two.
    """
    if not isinstance(complex_names, list) or not all(isinstance(name, str) for name in complex_names):
        raise CheckpointError("manifest: complex is no list of tensor names")
    result = dict(tensors)
    for name in complex_names:
        value = result.get(name)
        real = value is not None and value.dtype in (torch.float16, torch.float32, torch.float64)
        if value is None or not real or value.shape[-1:] != (2,):
            raise CheckpointError(f"manifest: complex tensor {name[:80]!r} is missing or malformed")
        result[name] = torch.view_as_complex(value)
    return result
