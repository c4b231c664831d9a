"""S4D layers: ours and the standalone S4D of state-spaces/s4 (kernel.C, kernel.log_A_real, kernel.A_imag, kernel.log_dt)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._diagonal_form import DiagonalForm, Modes, Scalars
from compressm.adapters.base import Analysis
from compressm.adapters.diagonal import DiagonalAdapter, tensor_input
from compressm.adapters.lti import DataGramians, LTIMeter, balanced, kind_of, used_of
from compressm.adapters.parameters import own_parameter, plain_parameters, wide
from compressm.control import Balanced, DiagonalSystem, Reduction, white_gramians
from compressm.kernels.lti_scan.op import without_autocast
from compressm.layers._discretization import zoh
from compressm.layers._fft_convolution import convolve
from compressm.layers._vandermonde import response

NAMES = ("kernel.C", "kernel.log_A_real", "kernel.A_imag")
STEP = "kernel.log_dt"


@dataclass(frozen=True)
class S4DForm(DiagonalForm):
    """log_lam = dt A, b = 1 and kappa = 2 (exp(dt A) - 1) / A, for every channel; dt stays.

    Only products of b and c matter: modes have b = 1, and a c that is written takes in what b it comes with.
    """

    log_dt: Tensor

    scalars = ("log_A_real", "A_imag", "log_dt")
    free = ("log_A_real", "A_imag")

    def coefficients(self, scalars: Scalars) -> tuple[Tensor, Tensor, Tensor]:
        A = torch.complex(-scalars["log_A_real"].exp(), scalars["A_imag"])
        log_lam, gain = zoh(A, scalars["log_dt"].exp())
        return log_lam, torch.ones_like(gain), 2 * gain

    def unpack(self, tensors: Mapping[str, Tensor], *, gradients: bool = False) -> Modes:
        C, log_A_real, A_imag = (tensors[name] for name in NAMES)
        scalars = {"log_A_real": log_A_real, "A_imag": A_imag, "log_dt": self.log_dt[:, None].expand(A_imag.shape)}
        c = torch.complex(*C.unbind(-1))
        return Modes(scalars, (torch.zeros_like if gradients else torch.ones_like)(c)[..., None], c[:, None, :])

    def pack(self, modes: Modes, *, gradients: bool = False) -> dict[str, Tensor]:
        c = modes.c[:, 0] if gradients else modes.c[:, 0] * modes.b[..., 0]
        packed = (torch.view_as_real(c.resolve_conj()), modes.scalars["log_A_real"], modes.scalars["A_imag"])
        return dict(zip(NAMES, packed, strict=True))

    def solve(self, log_lam: Tensor, old: Modes, live: Scalars | None) -> dict[str, Tensor]:
        dt = self.log_dt[:, None].exp()
        log_dt = self.log_dt[:, None].expand(log_lam.shape)
        return {"log_A_real": (-log_lam.real / dt).log(), "A_imag": log_lam.imag / dt, "log_dt": log_dt}

    def scale(self, b: Tensor, old: Modes, real: bool) -> Tensor:
        """Leaves b = 1."""
        return torch.where(b[..., 0] == 0, 1.0, b[..., 0])


@dataclass(frozen=True, eq=False)
class ChannelReduction:
    """Reductions of all channels of a layer to one rank; see :class:`compressm.adapters.base.Reduced`."""

    channels: tuple[Reduction, ...]

    @property
    def order(self) -> int:
        return self.channels[0].order

    @property
    def real_order(self) -> int:
        """What every channel keeps at least."""
        return min(channel.real_order for channel in self.channels)

    @property
    def method(self) -> str:
        """That of most channels, and of how many."""
        methods = [channel.method for channel in self.channels]
        common = max(dict.fromkeys(methods), key=methods.count)
        count = methods.count(common)
        return common if count == len(methods) else f"{common} in {count} of {len(methods)} channels"

    @property
    def output_error(self) -> None:
        return None

    def kept(self, order: int) -> Tensor:
        """Indices that most channels keep; a number does not mean one state in all channels."""
        counts = torch.bincount(torch.cat([channel.kept(order).cpu() for channel in self.channels]), minlength=order)
        return counts.argsort(descending=True, stable=True)[: self.order].sort().values


@dataclass(frozen=True, eq=False)
class ChannelAnalysis(Analysis[ChannelReduction]):
    """A balanced system for every channel, and one spectrum: value i is the sum of all channels' values i.

    All channels keep as many states, since the parameters have one N.  Twice the sum of the values cut is at least twice the
    tail of every channel, hence bounds the error of each and of all channels side by side.  A bound relative to the largest
    value is one of sums: that of the channels' errors over that of their gains.
    """

    channels: tuple[Balanced, ...]
    gramians: str
    hsv: Tensor = field(init=False, repr=False)
    convention: str = field(init=False)
    bounded: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hsv", torch.stack([channel.hsv for channel in self.channels]).sum(0))
        object.__setattr__(self, "convention", self.channels[0].convention)
        object.__setattr__(self, "bounded", self.gramians == "data-free")

    def modes(self, order: int) -> int:
        return max(channel.modes(order) for channel in self.channels)

    def reduce(self, rank: int) -> ChannelReduction:
        return ChannelReduction(tuple(channel.reduce(rank) for channel in self.channels))

    def spectrum_after(self, reduction: ChannelReduction) -> Tensor:
        """Anew from the reduced systems; with data Gramians the part that every channel keeps."""
        if self.bounded:
            return stacked(reduction)[0].hankel_singular_values(convention=self.convention).sum(0)
        return self.hsv[: reduction.real_order]


def stacked(reduction: ChannelReduction) -> tuple[DiagonalSystem, Tensor, Tensor, Tensor]:
    """The reduced systems as a batch, right (H, n, r), left (H, r, n) and multiplicity (H, r)."""
    channels = reduction.channels
    system = DiagonalSystem(*(torch.stack([getattr(c.system, name) for c in channels]) for name in ("log_lam", "B", "C")))
    right, left, multiplicity = (
        torch.stack([getattr(c, name) for c in channels]) for name in ("right", "left", "multiplicity")
    )
    return system, right, left, multiplicity


class S4DAdapter(DiagonalAdapter):
    """Reads every channel as a system of one input and one output; a rank is the complex modes that every channel keeps.

    The channels' spectra are added (see :class:`ChannelAnalysis`), so that loud channels count for more.  Steps, the skip and
    the layer's own output projection stay.  Systems of one input and one output have less to give up than those of many:
    expect smaller gains than for an S5 or LRU layer.
    """

    papers = ("gu2022parameterization",)

    decay = "kernel.log_A_real"

    def form(self, module: nn.Module) -> S4DForm:
        return S4DForm(wide(module.get_submodule("kernel").get_parameter("log_dt")))

    def axis(self, key: str) -> int:
        return 1

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return NAMES

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return ("D", STEP, "output_linear")

    def reads(self, module: nn.Module) -> tuple[str, ...]:
        return (*NAMES, STEP)

    def rank(self, module: nn.Module) -> int:
        return own_parameter(module, "kernel.C").shape[1]

    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """A complex number a mode and channel."""
        C = plain_parameters(module, ("kernel.C",))["kernel.C"]
        return rank * C.shape[0] * torch.promote_types(C.dtype, torch.float32).to_complex().itemsize

    def bases(self, reduction: Any) -> tuple[DiagonalSystem, Tensor, Tensor, Tensor]:
        return stacked(reduction)

    def analyse(self, module: nn.Module, name: str, convention: str, measured: DataGramians | None) -> Any:
        system, used = self.read(module, name), used_of(measured, convention)
        P, Q = white_gramians(system, convention)
        channels = []
        for h, channel in enumerate(system.unbatched()):
            own = None if used is None else replace(used, P=used.P[h], Q=None if used.Q is None else used.Q[h])
            channels.append(balanced(channel, convention, (P[h], Q[h]), own))
        return ChannelAnalysis(tuple(channels), kind_of(used))

    def remark(self, module: nn.Module) -> str:
        return "states of every channel, spectra summed over channels; of one input and output each, expect modest gains"

    def attributes(self, module: nn.Module, rank: int) -> dict[str, Any]:
        return {"n": 2 * rank} if hasattr(module, "n") else {}

    def meter(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> LTIMeter:
        return ChannelMeter(self, self.read(module, name), sequences, rows_per_state, seed)

    def layer_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        state = args[1] if len(args) > 1 else kwargs.get("initial_state")
        return tensor_input(args[0] if args else kwargs.get("u")), state


class ChannelMeter(LTIMeter):
    """Accumulates P and Q (H, 2N, 2N) of every channel.

    What leaves the state spaces is inside the layer.  It is computed again and goes through the layer's own output projection,
    so that gradients by it can be had; the output keeps its value.
    """

    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        given, state = self.adapter.layer_input(args, kwargs)
        layer: Any = module
        u = given if layer.transposed else given.mT
        start = None if state is None else torch.cat([state.real.flatten(1), state.imag.flatten(1)], -1).detach()
        if not self.replaying:
            self.p_rows += self._add(self.P, u.detach().mT, self.drive, start, reverse=False, adjoint=False)
        y = state_space(layer, u, state)
        watched = y if y.requires_grad else y.detach().requires_grad_()
        self.signals.append(watched)
        tail = layer.output_linear(layer.dropout(layer.activation(watched)))
        tail = tail if layer.transposed else tail.mT
        said = self.adapter.layer_output(output)
        return self.adapter.with_output(output, said.detach().clone() + (tail - tail.detach()).to(said.dtype))

    def adjoint(self, grad: Tensor) -> None:
        super().adjoint(grad.mT)

    def driven(self, signal: Tensor, weight: Tensor) -> Tensor:
        drive = signal[..., None] * weight[..., 0]  # (batch, steps, H, 2N)
        return drive.unflatten(-1, (2, -1)).transpose(-2, -3).flatten(2)

    def samples(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (2, self.drive.shape[0], -1)).permute(2, 0, 1, 3).flatten(2)


def state_space(layer: Any, u: Tensor, state: Tensor | None) -> Tensor:
    """A layer's convolution and skip, u (batch, H, L) -> the same shape, by its parameters and differentiable."""
    work = torch.promote_types(u.dtype, torch.float32)
    form = S4DForm(wide(layer.kernel.log_dt))
    with without_autocast(u.device.type):
        modes = form.unpack({name: wide(own_parameter(layer, name)) for name in NAMES})
        value = form.evaluate(modes.scalars)
        gain, log_lam = (part.to(work.to_complex()) for part in (modes.c[:, 0] * value.kappa, value.log_lam))
        length = u.shape[-1]
        y = convolve(u.to(work), response(gain, log_lam, length))
        if state is not None:
            y = y + response(gain * log_lam.exp() * state, log_lam, length)
        return (y + u * layer.D.to(work)[:, None]).to(u.dtype)
