"""What layers of one time-invariant system share: checks, the zero state, the plan of their scan."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from compressm.errors import bad_argument
from compressm.kernels import KernelPlan, plan
from compressm.layers._planned import PlannedLayer


class LTILayer(PlannedLayer):
    """(batch, L, d_model) -> (batch, L, d_model) by one diagonal system of ``d_state`` complex states."""

    d_model: int

    @property
    @abstractmethod
    def d_state(self) -> int:
        """States N, read from the parameters."""

    @property
    @abstractmethod
    def _state_like(self) -> Tensor:
        """A parameter of the states' device and precision."""

    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        H, N = self.d_model, self.d_state
        return plan("lti_scan", {"u": (batch, length, H), "B": (N, H), "C": (H, N)}, dtype, device)

    def initial_state(self, batch: int) -> Tensor:
        """The zero state (batch, N), complex."""
        like = self._state_like
        dtype = torch.promote_types(like.dtype.to_real(), torch.float32).to_complex()
        return torch.zeros(batch, self.d_state, dtype=dtype, device=like.device)

    def _check_sequence(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise bad_argument("x", got=f"shape {tuple(x.shape)}", expected=f"(batch, length, {self.d_model})")

    def _check_step(self, x: Tensor, state: Tensor) -> None:
        if x.dim() != 2 or x.shape[-1] != self.d_model:
            raise bad_argument("x", got=f"shape {tuple(x.shape)}", expected=f"(batch, {self.d_model})")
        if state.shape != (x.shape[0], self.d_state) or not state.is_complex():
            expected = f"(batch, N) = {(x.shape[0], self.d_state)}, complex"
            remedy = "A state from before a reduction has more states: begin anew, from initial_state(batch)"
            raise bad_argument("state", got=f"{tuple(state.shape)} of {state.dtype}", expected=expected, remedy=remedy)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}"
