"""Subspace identification: a state-space model from signals by least squares and one singular value decomposition.

The outputs of the next f steps are a linear function of what the past made of the state and of the inputs of these steps.  A
regression on p steps of past inputs and outputs and on the future inputs separates the two; the part of the past has the rank
of the system, and its leading directions are states, between which a further regression finds A, B, C and D (N4SID; Van
Overschee and De Moor, Automatica 30, 1994).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.control.state_space import StateSpace
from compressm.errors import DataError, bad_argument

NEGLIGIBLE = 1e-9  # share of the largest; without noise, pasts longer than the order are linearly dependent
WINDOWS = 20_000  # that the regression takes at most, evenly chosen


def subspace_identification(u: Tensor, y: Tensor, order: int, *, past: int = 20, future: int = 20) -> StateSpace:
    """The model of ``order`` states behind signals, computed on the CPU.

    Args:
        u: (sequences, L, inputs) or (L, inputs), which excite the system persistently.
        y: outputs of the same leading axes.
        order: states, at most ``future`` times the outputs.
        past, future: steps that the regression looks back and ahead; a system that forgets slowly wants more.

    Raises:
        ArgumentError: shapes do not fit, or an order that the window cannot hold.
        DataError: fewer windows than the regression has unknowns.
    """
    if u.dim() == 2 and y.dim() == 2:
        u, y = u[None], y[None]
    if u.dim() != 3 or u.shape[:2] != y.shape[:2] or y.dim() != 3:
        got = f"{tuple(u.shape)} and {tuple(y.shape)}"
        raise bad_argument("u, y", got=got, expected="(sequences, L, inputs) and (sequences, L, outputs)")
    most = future * y.shape[-1]
    if not 1 <= order <= most:
        raise bad_argument("order", got=order, expected=f"1 to {most}, future times the outputs")
    ins, outs = (windows(signal.double(), past + future + 1) for signal in (u.cpu(), y.cpu()))
    unknowns = past * (u.shape[-1] + y.shape[-1]) + future * u.shape[-1]
    if len(ins) < 2 * unknowns:
        raise DataError(f"{len(ins)} windows of {past + future + 1} steps, expected at least {2 * unknowns}. Give more data")
    # States at the ends of two pasts, one step apart, in the same coordinates.
    before = torch.cat([ins[:, :past].flatten(1), outs[:, :past].flatten(1)], 1)
    after = torch.cat([ins[:, 1 : past + 1].flatten(1), outs[:, 1 : past + 1].flatten(1)], 1)
    ahead, answers = ins[:, past:-1].flatten(1), outs[:, past:-1].flatten(1)
    weights = solved(torch.cat([before, ahead], 1), answers)[: before.shape[1]]
    _, sigma, directions = torch.linalg.svd(before @ weights, full_matrices=False)
    to_state = weights @ directions[:order].T / sigma[:order].sqrt() * len(before) ** 0.25
    state, following = before @ to_state, after @ to_state
    now = torch.cat([state, ins[:, past]], 1)
    dynamics = solved(now, torch.cat([following, outs[:, past]], 1)).T
    (A, B), (C, D) = (rows.split([order, u.shape[-1]], 1) for rows in dynamics.split([order, y.shape[-1]]))
    return StateSpace(A.contiguous(), B.contiguous(), C.contiguous(), D.contiguous())


def solved(matrix: Tensor, answers: Tensor) -> Tensor:
    """Least squares of least norm; torch's usual driver misjudges the rank of matrices without full rank."""
    return torch.linalg.lstsq(matrix, answers, rcond=NEGLIGIBLE, driver="gelsd").solution


def windows(signal: Tensor, steps: int) -> Tensor:
    """(windows, steps, channels) of a signal (sequences, L, channels): all, or evenly chosen ones where there are too many."""
    if signal.shape[1] < steps:
        return signal.new_empty(0, steps, signal.shape[2])
    every = signal.unfold(1, steps, 1).transpose(-1, -2).flatten(0, 1)
    return every[:: max(1, len(every) // WINDOWS)]
