"""Mamba-1 mixers: ours, mamba_ssm's and transformers' (in_proj, conv1d, x_proj, dt_proj, A_log, out_proj).

All channels share B_t = W_B x_t and C_t = W_C x_t, rows of the bias-free linear ``x_proj``.  A layer with fewer states keeps
the rows of W_B and the columns of A_log that belong to a subset of the states, and any linear map F of C_t goes into its
weight, F W_C: it stays an ordinary Mamba layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters._ranked import RowRanked, Rows
from compressm.adapters.base import Analysis, LayerEdit, Meter, TensorMap
from compressm.adapters.parameters import check_finite, label, layer_input, plain_parameters, precision
from compressm.control import (
    MeanSystem,
    RowCriterion,
    SelectiveMoments,
    SelectiveReduction,
    best_states,
    cross_root,
    mean_subset,
    refitted_subset,
    singular_values,
)
from compressm.errors import ModelError, NumericalError
from compressm.kernels import selective_scan
from compressm.layers.mamba_mixer import scan_inputs

NAMES = ("x_proj.weight", "A_log")
INDEPENDENT = ("in_proj", "conv1d", "dt_proj", "out_proj", "D", "x_proj.bias")  # the last is refused in words of its own
STEP_BYTES = 64 << 20  # of M_t kept per layer
SLAB_BYTES = 64 << 20  # of intermediate (channels, N, N) tensors
MIN_LOG_DECAY = 1e-12


@dataclass(frozen=True, eq=False)
class MambaAnalysis(Analysis[SelectiveReduction]):
    """Second moments of a selective scan; ``convention`` is ``"selective"``, ``"mean-LTI"``, or ``"scores"`` of a criterion."""

    moments: SelectiveMoments
    convention: str
    gramians: str
    criterion: RowCriterion | None = None
    bounded: bool = False
    hsv: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.criterion is not None:
            hsv = self.criterion.row_scores(self.moments.rows())[0].sort(descending=True).values
            object.__setattr__(self, "convention", "scores")
        elif self.convention == "mean-LTI":
            hsv = self.moments.mean.hankel_singular_values()
        else:
            hsv = singular_values(self.moments.P, self.moments.Q)
        object.__setattr__(self, "hsv", hsv)

    def modes(self, order: int) -> int:
        return order

    def reduce(self, rank: int) -> SelectiveReduction:
        if self.criterion is not None:
            return best_states(self.moments, rank, self.criterion)
        return (mean_subset if self.convention == "mean-LTI" else refitted_subset)(self.moments, rank)

    def spectrum_after(self, reduction: SelectiveReduction) -> Tensor:
        return self.hsv[: reduction.order]

    def scores(self) -> Tensor:
        if self.criterion is not None:
            return self.criterion.row_scores(self.moments.rows())[0]
        if self.convention == "mean-LTI":
            return self.moments.mean.scores()
        return (self.moments.P.diagonal() * self.moments.Q.diagonal()).clamp_min(0).sqrt()

    def root(self) -> Tensor | None:
        return cross_root(self.moments.P, self.moments.Q) if self.convention == "selective" else None


class MambaAdapter(RowRanked[SelectiveReduction]):
    """A subset of the states and a refitted C; the paper's recipe keeps C and chooses by the mean system of every channel.

    The spectrum of the default recipe is that of P = sum_d E[h_d h_d^T] and Q = E[C C^T]: its squares are the output energy
    that a projection of independent h and C would lose.  Without calibration data the inputs of the scan count as white noise
    of unit variance and the step sizes as ``dt_proj`` makes them of nothing.
    """

    paper_uses_data = True
    papers = ("gu2023mamba",)

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return NAMES

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return INDEPENDENT

    def reads(self, module: nn.Module) -> tuple[str, ...]:
        return (*NAMES, *(f"dt_proj.{name}" for name, _ in module.get_submodule("dt_proj").named_parameters()))

    def rank(self, module: nn.Module) -> int:
        return plain_parameters(module, ("A_log",))["A_log"].shape[1]

    def rows(self, module: nn.Module) -> Mapping[str, Rows]:
        parameters = plain_parameters(module, NAMES)
        weight, order = parameters["x_proj.weight"], parameters["A_log"].shape[1]
        index = len(weight) - 2 * order + torch.arange(order, device="cpu")[None]
        return {"x_proj.weight": (index, order + index)}

    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """``rank`` numbers a channel for the scan, 4 bytes each unless A_log is wider, and the last inputs of the convolution,
        which stay as they are but lie in the same slot of a server's cache."""
        A_log, conv = plain_parameters(module, ("A_log",))["A_log"], module.get_submodule("conv1d")
        named = [vars(module)[name] for name in ("d_conv", "conv_kernel_size") if name in vars(module)]
        width: int = named[0] if named else vars(conv)["kernel_size"][0]
        scan, window = torch.promote_types(A_log.dtype, torch.float32), precision(conv, torch.float32)
        return A_log.shape[0] * (rank * scan.itemsize + width * window.itemsize)

    def attributes(self, module: nn.Module, rank: int) -> dict[str, int]:
        parameters = plain_parameters(module, NAMES)
        width = parameters["x_proj.weight"].shape[0] - 2 * (parameters["A_log"].shape[1] - rank)
        names: tuple[str, ...] = ("d_state", "ssm_state_size")
        own = {name: rank for name in names if name in vars(module)}
        return {**own, "x_proj.out_features": width}

    def slowest(self, module: nn.Module) -> float:
        parameters = self._checked(module, "")
        dt = F.softplus(parameters["dt_bias"].double())
        return float(torch.exp(-dt * parameters["A_log"].detach().double().exp().amin(1)).max())

    @torch.no_grad()
    def analyse(self, module: nn.Module, name: str, convention: str, measured: SelectiveMoments | None) -> MambaAnalysis:
        parameters = self._checked(module, name)
        moments = white_moments(parameters) if measured is None else measured
        kind = "mean-LTI" if convention == "complex" else "selective"
        return MambaAnalysis(moments, kind, "data-free" if measured is None else "data", self.criterion)

    def meter(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> MambaMeter:
        return MambaMeter(self._checked(module, name)["A_log"], sequences, rows_per_state, seed)

    @torch.no_grad()
    def edit(self, module: nn.Module, reduction: SelectiveReduction) -> LayerEdit:
        parameters = plain_parameters(module, NAMES)
        order = parameters["A_log"].shape[1]
        low_rank = parameters["x_proj.weight"].shape[0] - 2 * order

        def subset(key: str, value: Tensor) -> Tensor:
            states = reduction.states.to(value.device)
            if key == "A_log":
                return value[:, states].contiguous()
            dt, B, C = value.split([low_rank, order, order])
            return torch.cat([dt, B[states], C[states]])

        def values(tensors: TensorMap) -> dict[str, Tensor]:
            result = {key: subset(key, tensors[key].double()) for key in NAMES}
            C = tensors["x_proj.weight"][low_rank + order :].double()
            result["x_proj.weight"][low_rank + reduction.order :] = reduction.mix.to(C.device) @ C
            return result

        def moments(tensors: TensorMap) -> dict[str, Tensor]:
            return {key: subset(key, tensors[key].double()) for key in NAMES}

        new = values({key: parameter.detach() for key, parameter in parameters.items()})
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new.values()):
            raise NumericalError("the reduced scan has NaN or infinite weights, expected finite values")
        tensors = {key: tensor.to(parameters[key]) for key, tensor in new.items()}
        # A kept row of W_C has the gradient it had: sum_td g_td h_tdn x_t^T, whatever F is; so have B and A_log, nearly.
        return LayerEdit(order, reduction.order, tensors, moments, moments, values, subset)

    def blank(self, module: nn.Module, rank: int) -> dict[str, Tensor]:
        parameters = plain_parameters(module, NAMES)
        weight, A_log = parameters["x_proj.weight"], parameters["A_log"]
        rows = weight.shape[0] - 2 * (A_log.shape[1] - rank)
        return {"x_proj.weight": weight.new_zeros(rows, weight.shape[1]), "A_log": A_log.new_zeros(A_log.shape[0], rank)}

    def _checked(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """What the scan depends on, finite: parameters, and ``dt_bias``, what ``dt_proj`` makes of nothing.

        Raises:
            ModelError, NumericalError: a parameter is missing or not finite.
        """
        parameters = plain_parameters(module, NAMES, name)
        dt_proj = module.get_submodule("dt_proj")
        inner = {f"dt_proj.{key}": parameter for key, parameter in dt_proj.named_parameters()}
        check_finite(module, {**parameters, **inner}, name)
        check_finite(module, {"exp(A_log)": parameters["A_log"].detach().double().exp()}, name)
        if getattr(module.x_proj, "bias", None) is not None:
            raise ModelError(f"{label(module, name)}: x_proj has a bias, expected none: C could not be refitted through it")
        weight, A_log = parameters["x_proj.weight"], parameters["A_log"]
        dtype = next(dt_proj.parameters(), weight).dtype
        with torch.no_grad():
            dt_bias = dt_proj(weight.new_zeros(weight.shape[0] - 2 * A_log.shape[1], dtype=dtype))
        return {**parameters, "dt_bias": dt_bias}


def white_moments(parameters: dict[str, Tensor]) -> SelectiveMoments:
    """Moments for white inputs of unit variance and the step sizes of ``dt_bias``."""
    weight, A_log, bias = (parameters[key].detach().double() for key in ("x_proj.weight", "A_log", "dt_bias"))
    order = A_log.shape[1]
    B, C = weight[-2 * order : -order], weight[-order:]
    dt = F.softplus(bias)
    log_lam = -(dt[:, None] * A_log.exp()).clamp_min(MIN_LOG_DECAY)
    decay = torch.zeros(order, order, dtype=torch.float64, device=A_log.device)
    slab = max(1, SLAB_BYTES // (8 * order**2))
    for first in range(0, len(dt), slab):
        part = log_lam[first : first + slab]
        decay += (dt[first : first + slab, None, None] ** 2 / -torch.expm1(part[:, :, None] + part[:, None, :])).sum(0)
    # The mean of B_t and of C_t vanishes for white inputs: their root mean squares stand in for it.
    mean = MeanSystem(log_lam, dt[:, None] * B.norm(dim=1), C.norm(dim=1))
    none = torch.zeros(0, order, dtype=torch.float64, device=A_log.device)
    return SelectiveMoments(decay * (B @ B.T), C @ C.T, none[:, :, None].expand(0, order, order), none, mean, B @ B.T)


class MambaMeter(Meter):
    """Looks at the states and at C_t at evenly spaced steps; the scan itself runs in between.

    Args:
        A_log: (D, N), for the sizes.
        sequences, rows_per_state, seed: as in ``Adapter.meter``.
    """

    def __init__(self, A_log: Tensor, sequences: int, rows_per_state: int | None, seed: int) -> None:
        super().__init__()
        order = A_log.shape[1]
        most = max(1, STEP_BYTES // (4 * order**2))
        self.sequences = sequences
        self.steps = most if rows_per_state is None else min(most, rows_per_state * order)
        self.random = torch.Generator("cpu").manual_seed(seed)
        self.M: list[Tensor] = []
        self.C: list[Tensor] = []
        self.A = -A_log.detach().double().exp()
        self.lam, self.drive = torch.zeros_like(self.A), torch.zeros_like(self.A)
        self.B = self.A.new_zeros(order, order)

    @property
    def reached(self) -> bool:
        return bool(self.M)

    def begin(self, seed: int) -> None:
        self.random.manual_seed(seed)

    def merge(self, add: Callable[[Any], Any], join: Callable[[Tensor], Tensor]) -> None:
        order = self.A.shape[1]
        kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        M = torch.cat(self.M) if self.M else torch.empty(0, order, order, **kind)
        C = torch.cat(self.C) if self.C else torch.empty(0, order, **kind)
        M, C = join(M), join(C)
        self.M, self.C = ([M], [C]) if len(M) else ([], [])
        self.lam, self.drive, self.B = add(self.lam), add(self.drive), add(self.B)

    @torch.no_grad()
    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.replaying:
            return
        x, selection = scan_inputs(module, layer_input(module, args, kwargs))
        delta, B, C = selection.dt.mT, selection.B.mT, selection.C.mT
        bias = x.new_zeros(x.shape[1]) if selection.dt_bias is None else selection.dt_bias
        length = x.shape[-1]
        stride = max(1, self.sequences * length // self.steps)
        first = int(torch.randint(min(stride, length), (1,), generator=self.random, device="cpu"))
        state, begin = None, 0
        for step in range(first, length, stride):
            part = slice(begin, step + 1)
            _, state = selective_scan(
                x[..., part], delta[..., part], self.A, B[..., part], C[..., part], delta_bias=bias, delta_softplus=True,
                return_last_state=True, initial_state=state,
            )  # fmt: skip
            self._add(state, C[..., step], F.softplus(delta[..., step] + bias), B[..., step])
            begin = step + 1

    def _add(self, h: Tensor, C: Tensor, dt: Tensor, B: Tensor) -> None:
        """One step of all sequences: h (batch, D, N), C and B (batch, N), dt (batch, D)."""
        self.M.append((h.mT @ h).float().cpu())
        self.C.append(C.float().cpu())
        dt, B = dt.double(), B.double()
        self.drive += dt.T @ B
        self.B += B.T @ B
        for row in dt:
            self.lam += torch.exp(row[:, None] * self.A)

    def result(self, name: str) -> SelectiveMoments:
        device = self.A.device
        M, C = torch.cat(self.M).to(device), torch.cat(self.C).to(device)
        steps = len(M)
        P = torch.zeros(M.shape[1:], dtype=torch.float64, device=device)
        for part in M.split(256):
            P += part.double().sum(0)
        wide = C.double()
        mean = MeanSystem((self.lam / steps).log().clamp_max(-MIN_LOG_DECAY), self.drive / steps, wide.mean(0))
        moments = SelectiveMoments(P / steps, wide.T @ wide / steps, M, C, mean, self.B / steps)
        for letter, matrix in (("E[h h^T]", moments.P), ("E[C C^T]", moments.Q), ("E[exp(dt A)]", self.lam)):
            if not bool(torch.isfinite(matrix).all()):
                raise NumericalError(
                    f"calibration: {letter} of layer {name!r} is not finite, expected finite states on the calibration "
                    "data. Look for NaN or infinity in the batches"
                )
        return moments
