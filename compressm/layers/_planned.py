"""What layers share that say which kernel runs them."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from compressm.kernels import KernelPlan


class PlannedLayer(nn.Module):
    """A layer whose kernel follows from its sizes and from those of its input (batch, L, channels)."""

    _last_call: tuple[str, torch.dtype, int, int] | None = None  # device type, dtype, batch and length of the input

    @property
    def kernel_plan(self) -> KernelPlan | None:
        """The kernel that runs the layer at its present number of states; None before the first call.

        For an input of the shape that was last seen in training mode, or of the first one if there was no training.
        """
        return None if self._last_call is None else self.plan_for(*self._last_call)

    @abstractmethod
    def plan_for(self, device: str, dtype: torch.dtype, batch: int, length: int) -> KernelPlan:
        """The kernel that runs such an input on that device type at the present number of states.

        :attr:`kernel_plan` is this of the input that was last seen in training mode, or of the first one.
        """

    def remember(self, x: Tensor, *, projected: bool = False) -> None:
        """Take x (batch, L, channels) for the call that :attr:`kernel_plan` is about, if it is one to remember.

        Args:
            projected: the kernel gets what projections make of x, in the dtype that autocast may choose.
        """
        if not torch.compiler.is_compiling() and (self.training or self._last_call is None):
            self._last_call = (x.device.type, _dtype_of_projections(x) if projected else x.dtype, x.shape[0], x.shape[1])


def _dtype_of_projections(x: Tensor) -> torch.dtype:
    device, dtype = x.device.type, x.dtype
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast and dtype != torch.float64 else dtype
