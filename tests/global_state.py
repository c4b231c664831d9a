"""State of the process that changes what later tests compute: reading it, putting it back, and changing it for a while."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

State = dict[str, Any]
ENVIRONMENT = ("OMP_", "MKL_", "CUBLAS_", "COMPRESSM_", "TRITON_INTERPRET")


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _flushes() -> bool:
    """Whether the smallest numbers count as zero; torch can set it and not tell it."""
    return (torch.full((1,), 1e-39) * 1.0).item() == 0


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}


def _set_environment(variables: dict[str, str]) -> None:
    for name in _environment().keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _flag(holder: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(holder, name), lambda value: setattr(holder, name, value)


ACCESS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "environment": (_environment, _set_environment),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly detection": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "deterministic algorithms": (_deterministic, lambda v: torch.use_deterministic_algorithms(v[0], warn_only=v[1])),
    "fill uninitialized memory": _flag(torch.utils.deterministic, "fill_uninitialized_memory"),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "flush denormal": (_flushes, torch.set_flush_denormal),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"), lambda v: torch.set_autocast_enabled("cpu", v)),
    "autocast dtype": (lambda: torch.get_autocast_dtype("cpu"), lambda v: torch.set_autocast_dtype("cpu", v)),
    "cudnn benchmark": _flag(torch.backends.cudnn, "benchmark"),
    "cudnn deterministic": _flag(torch.backends.cudnn, "deterministic"),
}


def read() -> State:
    """All of it, by name."""
    return {name: get() for name, (get, _) in ACCESS.items()}


def restore(before: State) -> list[str]:
    """Put back what differs from ``before``; one sentence for each."""
    now = read()
    changed = [name for name in ACCESS if now[name] != before[name]]
    for name in changed:
        ACCESS[name][1](before[name])
    return [f"{name}: was {before[name]}, is {now[name]}" for name in changed]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch runs on so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
