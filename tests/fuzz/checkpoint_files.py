"""Hostile checkpoint files: mutations that keep the checksum right, so that they reach the decoder, and plain damage."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import safetensors
import safetensors.torch
import torch

from compressm.compression.saving import checkpoint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
NAMES = ["../../etc/passwd", "/etc/passwd", "model/../x", "C:\\x", "a\0b", "", "model", "x" * 3000, "é\u2028", "__proto__", "0"]
MARKERS = ["!tensor", "!tuple", "!dict", "!float", "!floats"]


class Parts:
    """A checkpoint taken apart: manifest (a JSON tree) and tensors, complex ones as pairs."""

    def __init__(self, data: bytes) -> None:
        length = struct.unpack("<Q", data[:8])[0]
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        self.manifest: Any = json.loads(metadata[checkpoint.KEY])
        self.tensors = safetensors.torch.load(data)

    def build(self, text: str | None = None) -> bytes:
        """The file, with a checksum that fits."""
        text = json.dumps(self.manifest) if text is None else text
        crc = checkpoint._checksum(text, self.tensors)
        return safetensors.torch.save(self.tensors, metadata={checkpoint.KEY: text, checkpoint.CHECKSUM: crc})


def slots(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON tree."""
    found, rest = [], [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                found.append((node, key))
                rest.append(node[key])
    return found


def value(draw: random.Random, parts: Parts) -> Any:
    """Something that may not belong where it is put."""
    name = draw.choice(sorted(parts.tensors) or [""])
    _, somewhere = draw.choice([(c, c[k]) for c, k in slots(parts.manifest)] or [(None, None)])
    return draw.choice([
        None, True, False, -1, 0, 1, 3, 1 << 20, (1 << 20) + 1, 1 << 63, -(1 << 63), 10**300, 10**4000, 0.5, -0.0, 1e308,
        float("nan"), float("inf"), "abc", "", "1", "nan", [], {}, [[]], [1, 2], {"a": 1}, "\ud800", draw.choice(NAMES),
        {"!tensor": name}, {"!tensor": "gone"}, {"!tensor": 3}, {"!floats": name}, {"!float": "nan"}, {"!float": "1e3"},
        {"!tuple": [1]}, {"!tuple": 3}, {"!dict": [[1, 2], [1, 3]]}, {"!dict": [[True, 2]]}, {"!dict": [[[], 2]]},
        [{"!tensor": name}] * 50, copy.deepcopy(somewhere), nested(draw.choice([5, 60, 120, 500])),
    ])  # fmt: skip


def nested(depth: int) -> Any:
    """Lists in lists."""
    tree: Any = []
    for _ in range(depth):
        tree = [tree]
    return tree


def mutate_manifest(draw: random.Random, parts: Parts) -> bytes:
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = slots(parts.manifest)
        if not places:
            break
        container, key = draw.choice(places)
        kind = draw.choice(["set", "set", "set", "delete", "rename", "duplicate", "swap", "insert", "number"])
        if kind == "set":
            container[key] = value(draw, parts)
        elif kind == "delete":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[draw.choice([*NAMES, *MARKERS, f"{key}x"])] = container.pop(key)
        elif kind == "duplicate" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == "swap":
            other, its = draw.choice(places)
            container[key], other[its] = copy.deepcopy(other[its]), copy.deepcopy(container[key])
        elif kind == "insert" and isinstance(container, dict):
            container[draw.choice([*NAMES, *MARKERS])] = value(draw, parts)
        elif kind == "number" and isinstance(container[key], int | float) and not isinstance(container[key], bool):
            container[key] = draw.choice([-container[key], container[key] + 1, container[key] * 1e6, str(container[key])])
    return parts.build()


def mutate_ranks(draw: random.Random, parts: Parts) -> bytes:
    ranks = parts.manifest["ranks"]
    name = draw.choice(sorted(ranks))
    now = ranks[name]
    ranks[name] = draw.choice([now + 1, now - 1, 1, 1 << 20, (1 << 20) - 1, 1 << 40, 0, -3, True, 2.0, "4", None])
    progress = parts.manifest["compressor"]
    if progress is not None and draw.random() < 0.7:
        progress["ranks"] = dict(ranks)
    return parts.build()


def mutate_tensors(draw: random.Random, parts: Parts) -> bytes:
    name = draw.choice(sorted(parts.tensors))
    tensor = parts.tensors[name].clone()
    kind = draw.choice(["dtype", "cast", "shape", "cut", "grow", "empty", "poison", "drop", "add", "rename", "swap", "scalar"])
    if kind == "dtype" and tensor.numel():
        flat = tensor.reshape(-1).view(torch.uint8)
        fitting = [d for d in DTYPES[:-1] if flat.numel() % d.itemsize == 0]
        tensor = flat.view(draw.choice(fitting))
        tensor = tensor.reshape(parts.tensors[name].shape) if tensor.numel() == parts.tensors[name].numel() else tensor
    elif kind == "cast":
        tensor = tensor.to(draw.choice(DTYPES[:-1]))
    elif kind == "shape":
        turned = tensor.T.contiguous() if tensor.dim() == 2 else tensor[..., None]
        tensor = draw.choice([tensor.reshape(-1), tensor[None], turned])
    elif kind == "cut" and tensor.dim():
        tensor = tensor[: len(tensor) // 2].clone()
    elif kind == "grow" and tensor.dim():
        tensor = torch.cat([tensor, tensor])
    elif kind == "empty":
        tensor = tensor.new_zeros(draw.choice([(0,), (0, 1 << 40), (3, 0, 1 << 30)]))
    elif kind == "poison" and tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([float("nan"), float("inf"), -float("inf"), 1e30, -1.0])
    elif kind == "scalar":
        tensor = torch.tensor(draw.choice([1.0, -5.0, 1e30, float("nan")]))
    parts.tensors[name] = tensor
    if kind == "drop":
        del parts.tensors[name]
    elif kind == "add":
        parts.tensors[draw.choice(NAMES)] = torch.ones(3)
    elif kind == "rename":
        parts.tensors[draw.choice(NAMES)] = parts.tensors.pop(name)
    elif kind == "swap":
        other = draw.choice(sorted(parts.tensors))
        parts.tensors[name], parts.tensors[other] = parts.tensors[other].clone(), parts.tensors[name].clone()
    parts.tensors.pop("__metadata__", None)
    return parts.build()


def mutate_text(draw: random.Random, parts: Parts) -> bytes:
    """The manifest as text that json.dumps would not write."""
    text = json.dumps(parts.manifest)
    place = draw.randrange(len(text))
    container, key = draw.choice([slot for slot in slots(parts.manifest) if isinstance(slot[0], dict)])
    entry = f"{json.dumps(key)}: {json.dumps(container[key])}"
    return parts.build(draw.choice([
        text.replace(entry, f"{entry}, {entry}", 1),
        text.replace(entry, f"{json.dumps(key)}: {'9' * 5000}", 1),
        text.replace(entry, f"{json.dumps(key)}: NaN", 1),
        text.replace(entry, f"{json.dumps(key)}: 1e999", 1),
        text.replace(entry, json.dumps(key) + ": " + "[" * 100_000, 1),
        text.replace(entry, json.dumps(key) + ": " + '{"a":' * 3000 + "1" + "}" * 3000, 1),
        text[:place], text[:place] + text[place + 1 :], text + "x", "", "null", "\ufeff" + text,
        text[:place] + "\0" + text[place:],
        text[:place] + chr(32 + draw.randrange(95)) + text[place + 1 :],
    ]))  # fmt: skip


def mutate_header(draw: random.Random, data: bytes) -> bytes:
    """Lies in the header of safetensors itself, whose text need not be JSON any more."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    lie = draw.choice(["dtype", "shape", "offsets", "rename", "metadata", "overlap", "length"])
    if lie == "dtype":
        known = ["F16", "BF16", "F64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "C64", "F4", "U64"]
        entry["dtype"] = draw.choice([*known, "X", "", 3])
    elif lie == "shape":
        shape = entry["shape"]
        entry["shape"] = draw.choice([[1 << 62, 4], [1 << 63], [-1], [0], [], shape * 2, shape[::-1], ["2"], 3])
    elif lie == "offsets":
        entry["data_offsets"] = draw.choice([[0, 1 << 62], [1 << 63, 1 << 63], [-1, 4], [4, 0], [0], [0, len(body)], "ab"])
    elif lie == "rename":
        header[draw.choice(NAMES)] = header.pop(name)
    elif lie == "metadata":
        header["__metadata__"] = draw.choice([{}, {"compressm": 3}, [], {"compressm": "{}"}, {"compressm": None}, None, "x"])
    elif lie == "overlap":
        entry["data_offsets"] = header[draw.choice([key for key in header if key != "__metadata__"])]["data_offsets"]
    text = json.dumps(header).encode()
    if lie == "length":
        length = draw.choice([0, 1, 2**32, 2**63, 2**64 - 1, len(text) + 1, len(text) - 1, 100_000_001, 33 << 20])
        return struct.pack("<Q", length) + text + body
    return struct.pack("<Q", len(text)) + text + body


def damage(draw: random.Random, data: bytes) -> bytes:
    """What disks and transfers do."""
    result = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(max(1, len(result)))
        kind = draw.choice(["bit", "bit", "byte", "zero", "cut", "delete", "insert", "copy"])
        if not result:
            break
        if kind == "bit":
            result[place] ^= 1 << draw.randrange(8)
        elif kind == "byte":
            result[place] = draw.randrange(256)
        elif kind == "zero":
            size = min(512, len(result) - place)
            result[place : place + size] = bytes(size)
        elif kind == "cut":
            del result[place:]
        elif kind == "delete":
            del result[place : place + draw.randrange(1, 64)]
        elif kind == "insert":
            result[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 16)))
        elif kind == "copy":
            start = draw.randrange(len(result))
            result[place : place + 64] = result[start : start + 64]
    return bytes(result)


def _structured(mutate: Callable[[random.Random, Parts], bytes]) -> Callable[[random.Random, bytes], bytes]:
    def apply(draw: random.Random, data: bytes) -> bytes:
        try:
            return mutate(draw, Parts(data))
        except (safetensors.SafetensorError, UnicodeError, ValueError, RuntimeError):
            return damage(draw, data)  # what the format cannot hold at all

    return apply


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "manifest": _structured(mutate_manifest),
    "ranks": _structured(mutate_ranks),
    "tensors": _structured(mutate_tensors),
    "text": _structured(mutate_text),
    "header": mutate_header,
    "damage": damage,
}
WITHOUT_CHECKSUM = {"header", "damage"}
