"""Sizes at which everything that is measured runs in a moment."""

from __future__ import annotations

from compressm.benchmarking.cases import OPS, Case, case

SMALL = {
    "batch": 2, "length": 37, "channels": 16, "states": 7, "width": 4, "layers": 2, "rank": 3, "blocks": 1,
    "heads": 4, "groups": 2, "key_heads": 2, "keys": 7, "values": 5,
}  # fmt: skip


def small(op: str, passes: str | None = None, **sizes: int) -> Case:
    """A small case of an op; its last pass where none is named."""
    allowed = OPS[op]
    return case(op, {name: {**SMALL, **sizes}[name] for name in allowed.sizes}, passes or allowed.passes[-1])
