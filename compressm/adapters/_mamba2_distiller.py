"""What is trained of a Mamba-2 mixer that has lost states, on what the mixer got and gave before.

B and C alone change with the states that are left.  x behind its convolution, step sizes and gate are what they were: they are
computed once, and a step of training is the projection to B and C, their convolution, the scan with few states, and the norm.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters.base import Distiller, LayerEdit, TensorMap, layer_input, precision
from compressm.kernels import causal_conv1d, ssd
from compressm.layers._plain import plain
from compressm.layers.mamba2_mixer import gate, layout, limits, normed, project, scan_inputs, without_padding
from compressm.layers.mamba_mixer import SILU, convolve, decay

MAPS, ROWS = ("B_map", "C_map"), ("in_proj.weight", "conv1d.weight")
RATE, MAP_RATE = 4e-3, 2e-3  # Adam's first learning rates
WIDE = 64  # d_model from which on that of the projection falls like its weights, with the root
CHANNELS = 128  # of the mixer's output that a step looks at, others at every step


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


class _Mamba2Distiller(Distiller):
    """The mixer around B and C, in float32; norm and output projection are called as they are."""

    def __init__(self, module: Any, edit: LayerEdit) -> None:
        self.module, self.edit, self.sizes = module, edit, layout(module)
        self.trained: list[tuple[str, slice, Tensor, Tensor]] = []
        self.A, self.dt_bias = decay(module).detach().float(), module.dt_bias.detach().float()
        self.D = module.D.detach().float().view(self.sizes.heads, -1).squeeze(-1)
        old = module._parameters.get("init_states")
        self.before, self.after = (
            None if states is None else states.detach().float() for states in (old, edit.tensors.get("init_states", old))
        )

    @cached_property
    def readout(self) -> Tensor | None:
        """The output projection's weights behind the scan; None where it is more than its parameters say."""
        linear = self.module.out_proj
        return linear.weight.detach()[:, -self.sizes.channels :].float() if plain(linear, nn.Linear) else None

    def take(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        hidden, mask = layer_input(module, args, kwargs), kwargs.get("attention_mask")
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
        return {"hidden": hidden, "real": real}

    @torch.no_grad()
    def prepare(self, calls: TensorMap) -> dict[str, Tensor]:
        hidden, real = calls["hidden"], calls["real"]
        z, xBC, dt = project(self.module, hidden, real)
        xBC = without_padding(convolve(self.module, xBC.mT).mT, real)
        x, B, C = (part.float() for part in scan_inputs(self.module, xBC, self.sizes))
        fixed = {"x": x, "dt": dt.float(), "z": z.float(), "real": real}
        target = self._read(self._scan(fixed, B, C, self.before), slice(None))
        return {**fixed, "target": target, **self._sources(hidden, real, xBC)}

    def loss(self, sequences: TensorMap, random: torch.Generator | None) -> tuple[Tensor, Tensor]:
        target, channels = sequences["target"], slice(None)
        if random is not None:
            blocks = -(-target.shape[-1] // CHANNELS)
            begin = CHANNELS * int(torch.randint(blocks, (1,), generator=random, device="cpu"))
            channels = slice(begin, begin + CHANNELS)
        target = target[..., channels]
        output = self._read(self._scan(sequences, *self._features(sequences), self.after), channels)
        real = sequences["real"][..., None]
        return ((output - target) * real).square().sum(), (target * real).square().sum()

    def deltas(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, rows, leaf, begun in self.trained:
            found[key] = torch.zeros_like(self.edit.tensors[key], dtype=torch.float64)
            found[key][rows] = leaf.detach().double() - begun.double()
        return found

    def _train(self, key: str, rows: slice = slice(None)) -> Any:
        """Rows of one of the edit's tensors as a leaf; None if there is no such tensor."""
        if key not in self.edit.tensors:
            return None
        begun = self.edit.tensors[key][rows].detach().float().clone()
        leaf = begun.clone().requires_grad_()
        self.trained.append((key, rows, leaf, begun))
        return leaf

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

    def _read(self, y: Tensor, channels: slice) -> Tensor:
        """What the output projection makes of it, some channels: the mixer's output but for what is the same in both."""
        if self.readout is not None:
            return F.linear(y, self.readout[channels])
        project, owner = self.module.out_proj, vars(self.module)
        beside = owner["d_inner"] - owner["d_ssm"] if "d_ssm" in owner else 0  # channels of a gated MLP
        return project(F.pad(y, (beside, 0)).to(precision(project, y.dtype)))[..., channels].float()


class _Rows(_Mamba2Distiller):
    """The rows of B and C in the projection and their taps and biases in the convolution."""

    def __init__(self, module: nn.Module, edit: LayerEdit, multipliers: Tensor | None) -> None:
        super().__init__(module, edit)
        end = len(edit.tensors["in_proj.weight"]) - self.sizes.heads
        rows, channels = slice(end - 2 * self.sizes.groups * edit.rank_after, end), slice(self.sizes.channels, None)
        self.multipliers = None if multipliers is None else multipliers[..., rows].float()
        self.weight, self.bias = projection = [self._train(f"in_proj.{part}", rows) for part in ("weight", "bias")]
        self.taps, self.conv_bias = convolution = [self._train(f"conv1d.{part}", channels) for part in ("weight", "bias")]
        rates = (RATE * min(1.0, (WIDE / self.weight.shape[1]) ** 0.5), RATE)
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
        self.maps = [self._train(key) for key in MAPS]
        self.groups = [{"params": self.maps, "lr": MAP_RATE}]

    def _sources(self, hidden: Tensor, real: Tensor, xBC: Tensor) -> dict[str, Tensor]:
        shared = xBC[..., self.sizes.channels :].float()
        return {"features": shared.unflatten(-1, (2, self.sizes.groups, self.sizes.features))}

    def _features(self, sequences: TensorMap) -> tuple[Tensor, Tensor]:
        B, C = sequences["features"].unbind(-3)
        B_map, C_map = self.maps
        return torch.einsum("...gn,grn->...gr", B, B_map), torch.einsum("...gn,grn->...gr", C, C_map)
