"""What is trained of a Mamba-2 mixer that has lost states: what makes B and C.

x behind its convolution, step sizes and gate are what they were.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters._distilling import MAP_RATE, RATE, MixerDistiller, projection_rate
from compressm.adapters.base import Distiller, LayerEdit, TensorMap
from compressm.kernels import causal_conv1d, ssd
from compressm.layers._plain import plain
from compressm.layers.mamba2_mixer import gate, layout, limits, normed, project, scan_inputs, without_padding
from compressm.layers.mamba_mixer import SILU, convolve, decay

MAPS, ROWS = ("B_map", "C_map"), ("in_proj.weight", "conv1d.weight")


def mamba2_distiller(module: nn.Module, edit: LayerEdit, multipliers: Tensor | None) -> Distiller | None:
    """Trains the maps of an edit, or its rows of the projection and taps of the convolution where it has no maps.

    Args:
        module: the mixer as it is.
        edit: what it becomes.
        multipliers: of the rows of the edit's projection; None: all are one.

    Returns:
        None where the edit has neither, or where projection or convolution are more than their parameters say (hooks,
        subclasses), so that the part of B and C cannot be had alone.
    """
    if edit.tensors.keys() >= set(MAPS):
        return _Maps(module, edit)
    if not edit.tensors.keys() >= set(ROWS):
        return None
    whole = plain(module.get_submodule("in_proj"), nn.Linear) and plain(module.get_submodule("conv1d"), nn.Conv1d)
    return _Rows(module, edit, multipliers) if whole else None


class _Mamba2Distiller(MixerDistiller):
    """The mixer around B and C."""

    def __init__(self, module: Any, edit: LayerEdit) -> None:
        self.sizes, owner = layout(module), vars(module)
        beside = owner["d_inner"] - owner["d_ssm"] if "d_ssm" in owner else 0  # channels of a gated MLP
        super().__init__(module, edit, "in_proj", module.out_proj, beside)
        self.A, self.dt_bias = decay(module).detach().float(), module.dt_bias.detach().float()
        self.D = module.D.detach().float().view(self.sizes.heads, -1).squeeze(-1)
        old = module._parameters.get("init_states")
        self.before, self.after = (
            None if states is None else states.detach().float() for states in (old, edit.tensors.get("init_states", old))
        )

    def around(self, hidden: Tensor, real: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        z, xBC, dt = project(self.module, hidden, real)
        xBC = without_padding(convolve(self.module, xBC.mT).mT, real)
        x, B, C = (part.float() for part in scan_inputs(self.module, xBC, self.sizes))
        fixed = {"x": x, "dt": dt.float(), "z": z.float(), **self._sources(hidden, real, xBC)}
        return fixed, self._scan(fixed, B, C, self.before)

    def run(self, fixed: TensorMap) -> Tensor:
        return self._scan(fixed, *self._features(fixed), self.after)

    @abstractmethod
    def _sources(self, hidden: Tensor, real: Tensor, xBC: Tensor) -> dict[str, Tensor]:
        """What B and C are computed from."""

    @abstractmethod
    def _features(self, sequences: TensorMap) -> tuple[Tensor, Tensor]:
        """B and C (sequences, steps, G, states), as the scan takes them."""

    def _scan(self, fixed: TensorMap, B: Tensor, C: Tensor, states: Tensor | None) -> Tensor:
        """What the output projection gets from the scan, (sequences, steps, H P)."""
        x, z = fixed["x"], fixed["z"]
        states = None if states is None else states.expand(len(x), *states.shape)
        y: Any = ssd(
            x, fixed["dt"], self.A, B, C, None, self.D, gate(self.module, z, self.sizes), self.dt_bias, states,
            dt_softplus=True, dt_limit=limits(self.module),
        )  # fmt: skip
        y = y.flatten(-2)
        return self.module.norm(y, z).float() if normed(self.module) else y


class _Rows(_Mamba2Distiller):
    """The rows of B and C in the projection and their taps and biases in the convolution."""

    def __init__(self, module: nn.Module, edit: LayerEdit, multipliers: Tensor | None) -> None:
        super().__init__(module, edit)
        end = len(edit.tensors["in_proj.weight"]) - self.sizes.heads
        rows, channels = slice(end - 2 * self.sizes.groups * edit.rank_after, end), slice(self.sizes.channels, None)
        self.multipliers = None if multipliers is None else multipliers[..., rows].float()
        self.weight, self.bias = projection = [self.train(f"in_proj.{part}", rows) for part in ("weight", "bias")]
        self.taps, self.conv_bias = convolution = [self.train(f"conv1d.{part}", channels) for part in ("weight", "bias")]
        rates = projection_rate(self.weight), RATE
        self.groups = [
            {"params": [leaf for leaf in leaves if leaf is not None], "lr": rate}
            for leaves, rate in zip((projection, convolution), rates, strict=True)
        ]

    def _sources(self, hidden: Tensor, real: Tensor, xBC: Tensor) -> dict[str, Tensor]:
        return {"hidden": (without_padding(hidden, real) * getattr(self.module, "ssm_in_multiplier", 1)).float()}

    def _features(self, sequences: TensorMap) -> tuple[Tensor, Tensor]:
        BC: Any = F.linear(sequences["hidden"], self.weight, self.bias)
        BC = BC if self.multipliers is None else BC * self.multipliers
        silu = getattr(self.module, "activation", "silu") in SILU
        BC = causal_conv1d(BC.mT, self.taps[:, 0], self.conv_bias, activation="silu" if silu else None)
        BC = without_padding((BC if silu else self.module.act(BC)).mT, sequences["real"])
        B, C = BC.unflatten(-1, (2, self.sizes.groups, self.edit.rank_after)).unbind(-3)
        return B, C


class _Maps(_Mamba2Distiller):
    """The maps behind the activation."""

    def __init__(self, module: nn.Module, edit: LayerEdit) -> None:
        super().__init__(module, edit)
        self.maps = [self.train(key) for key in MAPS]
        self.groups = [{"params": self.maps, "lr": MAP_RATE}]

    def _sources(self, hidden: Tensor, real: Tensor, xBC: Tensor) -> dict[str, Tensor]:
        shared = xBC[..., self.sizes.channels :].float()
        return {"features": shared.unflatten(-1, (2, self.sizes.groups, self.sizes.features))}

    def _features(self, sequences: TensorMap) -> tuple[Tensor, Tensor]:
        B, C = sequences["features"].unbind(-3)
        B_map, C_map = self.maps
        return torch.einsum("...gn,grn->...gr", B, B_map), torch.einsum("...gn,grn->...gr", C, C_map)
