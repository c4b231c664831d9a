"""Trees of JSON values and tensors: the structure goes into a JSON manifest, the tensors into a safetensors file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressm.errors import CheckpointError

# A dict with exactly one of these keys is a marker; dicts of the user that would look like one are written as pairs.
TENSOR, TUPLE, PAIRS, NUMBER = "!tensor", "!tuple", "!dict", "!float"
MARKERS = frozenset({TENSOR, TUPLE, PAIRS, NUMBER})


def encode(tree: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree of None, bool, int, float, str, list, tuple, dict and tensors.

    Args:
        tree: the tree.
        where: name of this node, also the name under which a tensor is stored.
        tensors: receives the tensors.

    Raises:
        CheckpointError: something else is in the tree; names where.
    """
    if tree is None or isinstance(tree, bool | str):
        return tree
    if isinstance(tree, Tensor):
        key, again = where, 1
        while key in tensors:  # {"a/b": x, "a": {"b": y}} and {1: x, "1": y} lead to the same name
            key, again = f"{where}#{again}", again + 1
        tensors[key] = tree
        return {TENSOR: key}
    if type(tree) is int:
        return tree
    if type(tree) is float:
        return tree if math.isfinite(tree) else {NUMBER: repr(tree)}
    if isinstance(tree, list):
        return [encode(value, f"{where}/{i}", tensors) for i, value in enumerate(tree)]
    if type(tree) is tuple:
        return {TUPLE: [encode(value, f"{where}/{i}", tensors) for i, value in enumerate(tree)]}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) for key in tree) and not MARKERS & tree.keys():
            return {key: encode(value, f"{where}/{key}", tensors) for key, value in tree.items()}
        if all(isinstance(key, str | int) and not isinstance(key, bool) for key in tree):
            return {PAIRS: [[key, encode(value, f"{where}/{key}", tensors)] for key, value in tree.items()]}
        raise CheckpointError(f"{where}: a dict key is neither str nor int, expected JSON values and tensors")
    raise CheckpointError(
        f"{where}: got {type(tree).__name__}, expected None, bool, int, float, str, list, tuple, dict or torch.Tensor"
    )


def decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`encode`.

    Raises:
        CheckpointError: a tensor is missing, or a marker is malformed.
    """
    if isinstance(node, list):
        return [decode(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1 or not MARKERS & node.keys():
        return {key: decode(value, tensors) for key, value in node.items()}
    ((marker, value),) = node.items()
    if marker == TENSOR and isinstance(value, str) and value in tensors:
        return tensors[value]
    if marker == TUPLE and isinstance(value, list):
        return tuple(decode(item, tensors) for item in value)
    if marker == NUMBER and value in ("nan", "inf", "-inf"):
        return float(value)
    if marker == PAIRS and isinstance(value, list) and all(_is_pair(item) for item in value):
        return {key: decode(item, tensors) for key, item in value}
    raise CheckpointError(f"manifest: malformed entry {marker}: {str(value)[:80]!r}")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str | int)


def to_storable(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors as safetensors takes them (CPU, contiguous, no shared memory), and the names of complex ones.

    Complex tensors become real ones with a last axis of two.

    Raises:
        CheckpointError: a sparse or quantized tensor.
    """
    result: dict[str, Tensor] = {}
    complex_names, seen = [], set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout)
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
