"""S5 layers: ours and s5-pytorch's (parameters Lambda, B, C, log_step)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._diagonal_form import DiagonalForm, Modes, Scalars
from compressm.adapters.diagonal import DiagonalAdapter, tensor_input
from compressm.adapters.parameters import label, own_parameter, plain_parameters, wide
from compressm.errors import ModelError
from compressm.layers._discretization import DISCRETIZATIONS, continuous

NAMES = ("Lambda", "B", "C", "log_step")


@dataclass(frozen=True)
class S5Form(DiagonalForm):
    """log_lam and beta = B_bar / B of the discretization, at steps step_scale exp(log_step); kappa is a number.

    Attributes:
        discretization: ``"zoh"`` or ``"bilinear"``.
        kappa: 2 where a state stands for a conjugate pair, times sqrt(2) where C is that of both directions, one above the
            other: then twice the sum of the values cut bounds the error of their sum.
        directions: 1, or 2 with the columns of C side by side.
        step_scale: factor of all steps.
        shared_step: the one log_step of all states, which stays; None where every state has its own.
        prefix: of the parameters' names.
    """

    discretization: str
    kappa: float
    directions: int
    step_scale: float
    shared_step: Tensor | None
    prefix: str = ""

    scalars = ("Lambda.re", "Lambda.im", "log_step")
    free = ("Lambda.re", "Lambda.im")

    def coefficients(self, scalars: Scalars) -> tuple[Tensor, Tensor, Tensor]:
        Lambda, step = torch.complex(scalars["Lambda.re"], scalars["Lambda.im"]), self.step_scale * scalars["log_step"].exp()
        log_lam, gain = DISCRETIZATIONS[self.discretization](Lambda, step)
        return log_lam, gain, torch.full_like(step, self.kappa)

    def unpack(self, tensors: Mapping[str, Tensor], *, gradients: bool = False) -> Modes:
        Lambda, B, C = (tensors[self.prefix + name] for name in ("Lambda", "B", "C"))
        step = self.shared_step if self.shared_step is not None else tensors[f"{self.prefix}log_step"]
        scalars = {"Lambda.re": Lambda.real, "Lambda.im": Lambda.imag, "log_step": step.expand(Lambda.shape)}
        return Modes(scalars, torch.complex(*B.unbind(-1)), torch.cat(C.chunk(self.directions, 1)))

    def pack(self, modes: Modes, *, gradients: bool = False) -> dict[str, Tensor]:
        scalars = modes.scalars
        packed = {"Lambda": torch.complex(scalars["Lambda.re"], scalars["Lambda.im"])}
        packed |= {"B": torch.view_as_real(modes.b.resolve_conj()), "C": torch.cat(modes.c.chunk(self.directions), 1)}
        if self.shared_step is None:
            packed["log_step"] = scalars["log_step"]
        return {self.prefix + name: tensor for name, tensor in packed.items()}

    def solve(self, log_lam: Tensor, old: Modes, live: Scalars | None) -> dict[str, Tensor]:
        if live is None:
            log_step = old.scalars["log_step"].median().expand(log_lam.shape)
        else:
            log_step = live["log_step"]
        Lambda = continuous(log_lam, self.step_scale * log_step.exp(), self.discretization)
        return {"Lambda.re": Lambda.real, "Lambda.im": Lambda.imag, "log_step": log_step}


class S5Adapter(DiagonalAdapter):
    """Reads the discretized system; the skip D and a step that all states share stay.

    Both scans of a bidirectional layer have the same states, so that C counts as one matrix [C1; C2] of twice the outputs.
    Steps of single states become the median of the old steps, Lambda following, and in the real convention every row of B gets
    the median row norm that the layer had, C taking the inverse factor.
    """

    papers = ("smith2023simplified",)

    decay = "Lambda"

    def form(self, module: nn.Module) -> S5Form:
        layer: Any = module
        shared = wide(own_parameter(module, "log_step")) if layer.shared_step else None
        kappa = (2.0 if layer.conj_sym else 1.0) * (math.sqrt(2) if layer.bidir else 1.0)
        return S5Form(layer.discretization, kappa, 2 if layer.bidir else 1, layer.step_scale, shared)

    def axis(self, key: str) -> int:
        return 1 if key.endswith("C") else 0

    def copies(self, module: nn.Module, key: str) -> int:
        return 2 if self.bidirectional(module) and key.endswith("C") else 1

    def bidirectional(self, module: nn.Module) -> bool:
        layer: Any = module.get_submodule(self.prefix.rstrip("."))
        return layer.bidir

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        names = NAMES[:3] if self.form(module).shared_step is not None else NAMES
        return tuple(self.prefix + name for name in names)

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return (f"{self.prefix}D", f"{self.prefix}log_step")

    def reads(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in NAMES)

    def rank(self, module: nn.Module) -> int:
        return self._eigenvalues(module).shape[0]

    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """A complex number a state, and as many again for the other direction."""
        return rank * self._eigenvalues(module).dtype.itemsize * (2 if self.bidirectional(module) else 1)

    def _eigenvalues(self, module: nn.Module) -> nn.Parameter:
        key = f"{self.prefix}Lambda"
        return plain_parameters(module, (key,))[key]


class S5PytorchAdapter(S5Adapter):
    """s5-pytorch's ``S5SSM``, which takes one sequence (L, H), or its ``S5`` around it (``prefix="seq."``) for a batch.

    What is not time-invariant (``liquid``), has no B of its own (``factorized``) or raises its entries to a power (``degree``)
    is refused, and so are calls with steps of their own.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix

    def form(self, module: nn.Module) -> S5Form:
        inner: Any = module.get_submodule(self.prefix.rstrip("."))
        wrong = {"liquid": inner.liquid, "bcInit": inner.bcInit == "factorized", "degree": inner.degree != 1}
        for option, unsupported in wrong.items():
            if unsupported:
                got = f"{option}={getattr(inner, option)!r}"
                raise ModelError(f"{label(module)}: {got} is not supported, expected a dense, time-invariant S5 of degree 1")
        rule = inner.discretize
        discretization = getattr(rule, "__name__", getattr(rule, "name", "")).removeprefix("discretize_")
        if discretization not in DISCRETIZATIONS:
            raise ModelError(f"{label(module)}: unknown discretization {rule!r}, expected zoh or bilinear")
        directions = 2 if inner.bidir else 1
        return S5Form(discretization, math.sqrt(directions), directions, 1.0, None, self.prefix)

    def layer_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        given = dict(zip(("signal", "step_scale", "state"), args, strict=False)) | kwargs
        scale, state = given.get("step_scale", 1.0), given.get("state")
        if bool((torch.as_tensor(scale) != 1).any()):
            raise ModelError("an S5 layer was called with a step_scale, expected calibration at the steps it is trained with")
        u = tensor_input(given.get("signal"))
        return (u, state) if self.prefix else (u[None], None if state is None else state[None])
