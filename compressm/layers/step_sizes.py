"""The projection to a Mamba layer's step sizes, which has an initialisation of its own."""

from __future__ import annotations

import math

import torch
from torch import nn


class StepSizes(nn.Linear):
    """A ``nn.Linear`` whose outputs, behind softplus, begin as step sizes (Gu and Dao 2023, section 3.6).

    Args:
        dt_rank, d_inner: inputs and outputs.
        dt_min, dt_max: ``softplus(bias)`` is drawn log-uniformly from this range.
        dt_init: ``"random"``, weights uniform in +- dt_scale / sqrt(dt_rank), or ``"constant"``, all equal to that bound.
        dt_scale: see ``dt_init``.
        dt_init_floor: least initial step size.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dt_rank: int,
        d_inner: int,
        *,
        dt_min: float,
        dt_max: float,
        dt_init: str,
        dt_scale: float,
        dt_init_floor: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dt_min, self.dt_max, self.dt_init, self.dt_scale = dt_min, dt_max, dt_init, dt_scale
        self.dt_init_floor = dt_init_floor
        super().__init__(dt_rank, d_inner, bias=True, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial parameters."""
        super().reset_parameters()
        scale = self.dt_scale * self.in_features**-0.5
        if self.dt_init == "constant":
            nn.init.constant_(self.weight, scale)
        else:
            nn.init.uniform_(self.weight, -scale, scale)
        span = math.log(self.dt_max) - math.log(self.dt_min)
        drawn = torch.rand(self.out_features, device=self.bias.device)
        dt = torch.exp(drawn * span + math.log(self.dt_min)).clamp_min(self.dt_init_floor)
        self.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        vars(self.bias)["_no_reinit"] = True
