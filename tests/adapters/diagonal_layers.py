"""S5 and S4D layers of all kinds, and what their systems and skips make of a signal."""

from __future__ import annotations

import copy
import math

import torch
from adapters.published_layers import S5Wrapper, StandaloneS4D
from torch import nn

from compressm.adapters import find_layers
from compressm.adapters.s4d import state_space
from compressm.control import DiagonalSystem
from compressm.layers import S4D, S5

F64 = {"dtype": torch.float64}
H = 3
S5S = {
    "zoh": lambda: S5(H, 6, block_count=2, **F64),
    "bilinear": lambda: S5(H, 6, discretization="bilinear", step_scale=3.0, **F64),
    "pairs": lambda: S5(H, 6, conj_sym=True, **F64),
    "bidir": lambda: S5(H, 6, bidir=True, conj_sym=True, **F64),
    "shared": lambda: S5(H, 6, shared_step=True, **F64),
    "published": lambda: S5Wrapper(H, 6),
    "published bidir": lambda: S5Wrapper(H, 6, bidir=True, discretization="bilinear"),
}
S4DS = {
    "lin": lambda: S4D(H, 12, **F64),
    "inv": lambda: S4D(H, 12, init="inv", dt_min=0.01, **F64),
    "standalone": lambda: StandaloneS4D(H, 12),
}
ALL = S5S | S4DS


def relative(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    return float(((actual - oracle).norm() / oracle.norm()).detach())


def made(kind: str):
    layer = ALL[kind]()
    return layer, find_layers(layer)[""][1]


def signal(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer's system and skip make of x (batch, L, H)."""
    if "kernel" in dict(layer.named_children()):
        return state_space(layer, x.mT, None).mT
    return layer(x)


def impulses(steps: int) -> torch.Tensor:
    x = torch.zeros(H, steps, H, dtype=torch.float64)
    x[torch.arange(H), 0, torch.arange(H)] = 1
    return x


def response(layer: nn.Module, steps: int = 40) -> torch.Tensor:
    """(steps, H_out, H_in) of the layer's causal part, without the skip; of both directions where there are two."""
    x = impulses(steps)
    D = layer.seq.D if hasattr(layer, "seq") else layer.D
    return (signal(layer, x) - D * x).detach().permute(1, 2, 0)


def described(system: DiagonalSystem, kind: str, steps: int = 40) -> torch.Tensor:
    """The same of the system that an adapter reads."""
    found = system.impulse_response(steps).real
    if kind in S4DS:  # (H, steps, 1, 1)
        return torch.diag_embed(found[..., 0, 0].T)
    if "bidir" in kind:  # the causal half, and of the other half what an impulse at the first step leaves there
        causal, other = (found / math.sqrt(2)).chunk(2, 1)
        return causal + torch.nn.functional.pad(other[:1], (0, 0, 0, 0, 0, steps - 1))
    return found


def apply(layer: nn.Module, edit) -> nn.Module:
    edited = copy.deepcopy(layer)
    for key, tensor in edit.tensors.items():
        owner, _, leaf = key.rpartition(".")
        edited.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor)
    return edited


def signal_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if "kernel" in dict(layer.named_children()):
        out = layer(x.mT)
        return (out[0] if isinstance(out, tuple) else out).mT
    return layer(x)
