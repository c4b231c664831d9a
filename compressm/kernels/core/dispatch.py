"""The only place that chooses a backend.

Every op offers candidates in order of preference.  The automatic choice takes the first that supports the call; an
explicit ``backend=`` that cannot run raises with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compressm import config
from compressm.errors import BackendError
from compressm.kernels.core import cpp
from compressm.kernels.core.custom_op import transformed

COMPILED = ("triton", "cpp")


@dataclass(frozen=True)
class Candidate:
    """A backend and the check that says why it cannot run a call (None: it can)."""

    name: str
    why_not: Callable[[], str | None]


def compiled_first(
    device: str, triton: Callable[[], str | None], cpp: Callable[[], str | None]
) -> tuple[Candidate, Candidate, Candidate]:
    """Triton, C++ and the reference, each where it is at home first: on CPU tensors Triton comes last.

    Args:
        device: device type of the tensors.
        triton, cpp: why each cannot run the call.
    """
    first, others = Candidate("triton", triton), (Candidate("cpp", cpp), Candidate("reference", lambda: None))
    return (*others, first) if device == "cpu" else (first, *others)


def chooser(op: str, candidates: Callable[..., Sequence[Candidate]]) -> Callable[..., str]:
    """The function that chooses the backend of an op, and remembers what it chose.

    Args:
        op: its name, for messages.
        candidates: of what the choice depends on, such as device type and dtype; never a size: torch.compile takes the answer
            as a constant while it traces, for all sizes.

    Returns:
        ``choose_backend(*facts, backend=None)``, the name of a backend.
    """

    @functools.lru_cache(maxsize=256)
    def remembered(facts: tuple, backend: str | None, _preferred: str | None, _transformed: bool) -> str:
        return choose(op, candidates(*facts), backend)

    def choose_backend(*facts: Any, backend: str | None = None) -> str:
        return remembered(facts, backend, config.backend(), transformed())

    # What torch.compiler.assume_constant_result does, without importing torch's compiler, which takes two seconds.
    choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return choose_backend


def cpp_or_reference(device: str, dtype: torch.dtype) -> tuple[Candidate, Candidate]:
    """C++ where it runs for tensors of this device type and dtype, else the reference."""
    return Candidate("cpp", lambda: cpp.why_not_for(device, dtype)), Candidate("reference", lambda: None)


def choose(op: str, candidates: Sequence[Candidate], backend: str | None = None) -> str:
    """Name of the backend that runs ``op``.

    Args:
        op: name of the op, for messages.
        candidates: in order of preference; the last should support everything.
        backend: the caller's explicit choice; else ``COMPRESSM_BACKEND`` where the op has such a backend; else automatic.

    Raises:
        BackendError: the explicit choice is unknown or cannot run, or no candidate can; says each reason.
    """
    explicit = backend
    if explicit is None:
        preferred = config.backend()
        explicit = preferred if any(candidate.name == preferred for candidate in candidates) else None
    if explicit is not None:
        for candidate in candidates:
            if candidate.name == explicit:
                reason = _why_not(candidate)
                if reason is not None:
                    raise BackendError(f"{op}: backend {explicit!r} cannot run this call: {reason}")
                return explicit
        names = ", ".join(candidate.name for candidate in candidates)
        raise BackendError(f"{op}: backend: expected one of {names}, got {explicit!r}")
    reasons = []
    for candidate in candidates:
        reason = _why_not(candidate)
        if reason is None:
            return candidate.name
        reasons.append(f"{candidate.name}: {reason}")
    raise BackendError(f"{op}: no backend can run this call ({'; '.join(reasons)})")


def _why_not(candidate: Candidate) -> str | None:
    if candidate.name in COMPILED and transformed():
        return "its kernels have no derivatives in forward mode or for torch.func; the reference has both"
    return candidate.why_not()
