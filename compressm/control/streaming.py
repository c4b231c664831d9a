"""A system in a control loop: one input in, one output out, in a few microseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressm.control.coordinates import Coordinates
from compressm.control.state_space import StateSpace
from compressm.control.system import DiagonalSystem, check_single
from compressm.errors import bad_argument


class Stream:
    """Steps a system by one product [x; y] = [A B; C D] [x; u] in numpy, where a torch operation alone takes microseconds.

    The matrices are copied when it is made: make another one when the system changes.  The product is dense, about n^2
    multiplications for n real states: meant for some dozens of them.

    Args:
        system: a model y_t = C x_t + D u_t, x_{t+1} = A x_t + B u_t, or an unbatched diagonal system, whose output
            y_t = Re(C h_t) + D u_t hears the input at once, as a layer's does.
        D: (outputs, inputs) of a diagonal system; None for zero.

    Raises:
        ArgumentError: a batch of systems, or a D that does not fit, or that a model has already.
    """

    def __init__(self, system: DiagonalSystem | StateSpace, D: Tensor | None = None) -> None:
        A, B, C, feed = _model(system, D).arrays()
        self._states, self._inputs, self._outputs = len(A), B.shape[1], len(C)
        self._matrix = np.block([[A, B], [C, feed]])
        self._now, self._next = np.zeros(self._states + self._inputs), np.zeros(self._states + self._outputs)

    def step(self, u: Any) -> np.ndarray:
        """The output (outputs,) float64 to the input u (inputs,).

        Raises:
            ArgumentError: u is not of that shape.
        """
        n, now, then = self._states, self._now, self._next
        u = np.asarray(u)
        if u.shape != (self._inputs,):
            raise bad_argument("u", got=f"shape {u.shape}", expected=f"({self._inputs},)")
        now[n:] = u
        np.dot(self._matrix, now, out=then)
        now[:n] = then[:n]
        return then[n:].copy()

    def reset(self) -> None:
        """Back to the zero state."""
        self._now[:] = 0.0

    @property
    def state(self) -> np.ndarray:
        """A copy of the state (n,), of a diagonal system [Re h; Im h]; set it to go on from it."""
        return self._now[: self._states].copy()

    @state.setter
    def state(self, value: Any) -> None:
        value = np.asarray(value)
        if value.shape != (self._states,):
            raise bad_argument("state", got=f"shape {value.shape}", expected=f"({self._states},)")
        self._now[: self._states] = value


def _model(system: DiagonalSystem | StateSpace, D: Tensor | None) -> StateSpace:
    """The matrices whose state before an input is the system's state after the last one."""
    if isinstance(system, StateSpace):
        if D is not None:
            raise bad_argument("D", got=f"shape {tuple(D.shape)}", expected="none: the model has its own")
        return system
    check_single(system)
    at = Coordinates.of(system, "real")
    at_once = at.C @ at.B
    if D is not None:
        if D.shape != at_once.shape:
            raise bad_argument("D", got=f"shape {tuple(D.shape)}", expected=f"{tuple(at_once.shape)}")
        at_once = at_once + D.detach().to(at_once.device, torch.float64)
    return StateSpace(at.A, at.B, at.C @ at.A, at_once)
