"""All ops, and which kernel would run: a pure function of shapes, dtype and device."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

import torch

from compressm import kernels
from compressm.errors import bad_argument
from compressm.kernels.core.op import Op
from compressm.kernels.core.plan import KernelPlan


def discover() -> dict[str, Op]:
    """The records ``OPS`` of every folder of this package, by name."""
    folders = (f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg)
    found = (op for folder in folders for op in getattr(importlib.import_module(folder), "OPS", ()))
    return {op.name: op for op in found}


OPS = discover()


def plan(
    op: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> KernelPlan:
    """The plan that an op follows; runs nothing but the first C++ build.

    Args:
        op: a key of :data:`compressm.kernels.OPS`, such as ``"selective_scan"``.
        shapes: of the arguments that its plan depends on, by name (``OPS[op].shapes``), such as
            ``{"u": (batch, D, L), "A": (D, N)}``.
        dtype: of the inputs.
        device: of the arguments.
        backend: as the op takes it.

    Raises:
        ArgumentError: unknown op, or shapes that are missing or do not fit.
        BackendError: the named backend cannot run.
    """
    if op not in OPS:
        raise bad_argument("op", got=repr(op), expected=f"one of {', '.join(OPS)}")
    record = OPS[op]
    for name, axes in record.shapes.items():
        if len(shapes.get(name, ())) != axes.count(",") + 1:
            raise bad_argument("shapes", got=f"{name}: {shapes.get(name)}", expected=f"{name} {axes}")
    return record.plan(shapes, dtype, torch.device(device).type, backend)
