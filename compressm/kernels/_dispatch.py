"""The only place that chooses a backend.

Every op offers candidates in order of preference.  The automatic choice takes the first that supports the call; an
explicit ``backend=`` that cannot run raises with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compressm import config
from compressm.errors import BackendError
from compressm.kernels import _cpp


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


@torch.compiler.assume_constant_result
def cpp_or_reference(op: str, device: str, dtype: torch.dtype, backend: str | None) -> str:
    """The backend of an op that is C++ or torch's own; torch.compile takes it as a constant while it traces."""
    return _cpp_or_reference(op, device, dtype, backend, config.backend())


@functools.lru_cache(maxsize=256)
def _cpp_or_reference(op: str, device: str, dtype: torch.dtype, backend: str | None, _preferred: str | None) -> str:
    candidates = (Candidate("cpp", lambda: _cpp.why_not_for(device, dtype)), Candidate("reference", lambda: None))
    return choose(op, candidates, backend)


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
                reason = candidate.why_not()
                if reason is not None:
                    raise BackendError(f"{op}: backend {explicit!r} cannot run this call: {reason}")
                return explicit
        names = ", ".join(candidate.name for candidate in candidates)
        raise BackendError(f"{op}: backend: expected one of {names}, got {explicit!r}")
    reasons = []
    for candidate in candidates:
        reason = candidate.why_not()
        if reason is None:
            return candidate.name
        reasons.append(f"{candidate.name}: {reason}")
    raise BackendError(f"{op}: no backend can run this call ({'; '.join(reasons)})")
