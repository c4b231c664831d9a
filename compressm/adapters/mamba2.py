"""Mamba-2 mixers: ours, mamba_ssm's and those of transformers' models (in_proj, conv1d, dt_bias, A_log, D, out_proj).

Heads of a group share B_t and C_t, N channels each that come out of the projection, the convolution and its activation; the
state of a head decays by one number.  Two forms:

* strict: a subset of the channels of every group goes on, with its rows of the projection and its taps.  It stays a layer of
  its class, which every library loads.
* projected: layers with maps behind the activation (``B_map``, ``C_map`` of ``compressm.layers.Mamba2(d_features=...)``) keep
  all channels and get smaller maps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters._mamba2_meter import Mamba2Meter
from compressm.adapters.base import (
    Adapter,
    Analysis,
    LayerEdit,
    TensorMap,
    Transport,
    check_finite,
    label,
    own_parameter,
    plain_parameters,
    precision,
)
from compressm.control import MatrixMoments, MatrixReduction, pair_spectrum, projection, subset, subset_spectrum
from compressm.errors import ModelError, NumericalError, bad_argument
from compressm.layers.mamba2_mixer import Layout, layout

TRANSFORMERS = (  # classes whose forwards are near-copies of one another
    "transformers.models.bamba.modeling_bamba.BambaMixer",
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer",
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer",
    "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer",
    "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer",
    "transformers.models.zamba2.modeling_zamba2.Zamba2MambaMixer",
)
MAPS = ("B_map", "C_map")
SCAN = ("dt_bias", "A_log")
SELECTED = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "init_states")  # of the strict form, if present
INDEPENDENT = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj", "mup_vector")
KERNEL_MULTIPLE = 16  # Triton kernels of mamba_ssm are no faster between its multiples
VECTOR = 8  # channels at a time that causal-conv1d's kernels load, out of rows that have to be multiples as well
WHITE = (4, 256)  # sequences and steps of white noise that stand in for data


@dataclass(frozen=True, eq=False)
class Mamba2Analysis(Analysis[MatrixReduction]):
    """Second moments of a scan with matrix-valued states.

    The squares of the spectrum are energies of the scan's output: in the projected form what a cut would lose if C and the
    state were independent and the state as B, in the strict form what backward selection takes away.
    """

    moments: MatrixMoments
    gramians: str
    projected: bool
    convention: str = "selective"
    bounded: bool = False
    hsv: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hsv", (pair_spectrum if self.projected else subset_spectrum)(self.moments))

    def modes(self, order: int) -> int:
        return order

    def reduce(self, rank: int) -> MatrixReduction:
        reduction = (projection if self.projected else subset)(self.moments, rank)
        if not bool(torch.isfinite(reduction.key).all() and torch.isfinite(reduction.query).all()):
            raise NumericalError("the maps of the reduced scan are not finite, expected finite second moments of B and C")
        return reduction

    def spectrum_after(self, reduction: MatrixReduction) -> Tensor:
        return self.hsv[: reduction.order]


class Mamba2Adapter(Adapter[MatrixReduction]):
    """The projected form for layers that have maps, the strict one for all others; recipe "paper" does not know these layers.

    Without calibration data the layer's input counts as white noise of unit variance.

    Args:
        foreign: the layer runs kernels of other libraries, which want numbers of channels that divide well.
    """

    conventions = ("real",)
    papers = ("dao2024transformers",)

    def __init__(self, *, foreign: bool = False) -> None:
        self.foreign = foreign

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        if _projected(module):
            return MAPS
        biased = {f"{part}.bias": getattr(module.get_submodule(part), "bias", None) for part in ("in_proj", "conv1d")}
        absent = {key for key, value in biased.items() if value is None}
        absent |= set() if module._parameters.get("init_states") is not None else {"init_states"}
        return tuple(key for key in SELECTED if key not in absent)

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return INDEPENDENT

    def rank(self, module: nn.Module) -> int:
        if _projected(module):
            return own_parameter(module, "B_map").shape[1]
        plain_parameters(module, ("conv1d.weight", "A_log"))
        return layout(module).features

    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """``rank`` numbers a channel for the scan, float32 unless A_log is wider, and the last inputs of the convolution."""
        A_log, conv = plain_parameters(module, ("A_log",))["A_log"], module.get_submodule("conv1d")
        named = [vars(module)[name] for name in ("d_conv", "conv_kernel_size") if name in vars(module)]
        width: int = named[0] if named else vars(conv)["kernel_size"][0]
        sizes = layout(module)
        inner = sum(sizes.convolved if _projected(module) else sizes._replace(features=rank).convolved)
        scan, window = torch.promote_types(A_log.dtype, torch.float32), precision(conv, torch.float32)
        return sizes.channels * rank * scan.itemsize + inner * width * window.itemsize

    def attributes(self, module: nn.Module, rank: int) -> dict[str, Any]:
        if _projected(module):
            return {}
        sizes, rows = layout(module), own_parameter(module, "in_proj.weight").shape[0]
        after = sizes._replace(features=rank)
        inner, shared = sum(after.convolved), after.convolved[1]
        sizes_by_name = {"d_state": rank, "ssm_state_size": rank, "conv_dim": inner, "groups_time_state_size": shared}
        own: dict[str, Any] = {name: size for name, size in sizes_by_name.items() if name in vars(module)}
        own |= dict.fromkeys((f"conv1d.{name}" for name in ("in_channels", "out_channels", "groups")), inner)
        own["in_proj.out_features"] = rows + inner - sum(sizes.convolved)
        if module._buffers.get("mup_vector") is not None:
            own["mup_vector"] = _multipliers(module, sizes, after)
        return own

    def round_to(self, module: nn.Module) -> int:
        return KERNEL_MULTIPLE if self.foreign else 1

    def check_rank(self, module: nn.Module, rank: int) -> None:
        """Raise ArgumentError where the convolution's channels or the projection's rows would no longer divide by 8."""
        if not self.foreign or _projected(module):
            return
        sizes, rows = layout(module), own_parameter(module, "in_proj.weight").shape[0]
        now, then = sum(sizes.convolved), sum(sizes._replace(features=rank).convolved)
        for what, before, after in (("channels of conv1d", now, then), ("rows of in_proj", rows, rows + then - now)):
            if before % VECTOR == 0 and after % VECTOR:
                step = next(n for n in (1, 2, 4) if 2 * sizes.groups * n % VECTOR == 0)
                raise bad_argument(
                    "rank",
                    got=f"{rank} states for a {type(module).__name__}, which would have {after} {what}",
                    expected=f"a multiple of {step}: the CUDA kernels of its library need multiples of {VECTOR} channels",
                    remedy="Pass multiple_of=1 where other kernels run it",
                )

    def slowest(self, module: nn.Module) -> float:
        parameters = self._checked(module, "")
        dt = F.softplus(parameters["dt_bias"].detach().double())
        return float(torch.exp(-dt * parameters["A_log"].detach().double().exp()).max())

    @torch.no_grad()
    def analyse(self, module: nn.Module, name: str, convention: str, measured: MatrixMoments | None) -> Mamba2Analysis:
        self._checked(module, name)
        if convention not in self.conventions:
            raise ModelError(f"{label(module, name)}: recipe 'paper' has no method for a decay that all states of a head share")
        moments = self._white(module, name) if measured is None else measured
        return Mamba2Analysis(moments, "data-free" if measured is None else "data", _projected(module))

    def meter(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> Mamba2Meter:
        device = self._checked(module, name)["A_log"].device
        return Mamba2Meter(layout(module).groups, self.rank(module), device, sequences, rows_per_state, seed)

    @torch.no_grad()
    def edit(self, module: nn.Module, reduction: MatrixReduction) -> LayerEdit:
        parameters = plain_parameters(module, self.parameters(module))
        order = self.rank(module)
        if reduction.rows is None:
            maps = {"B_map": reduction.key, "C_map": reduction.query}
            values = partial(_mapped, maps)
            # Where the output stays as it is, what B' is multiplied with is E_q times what B was, and the other way round.
            first = {"B_map": reduction.query, "C_map": reduction.key}
            second = {key: map_.square() for key, map_ in first.items()}
            carried: tuple[Transport, Transport, Transport] = (partial(_mapped, first), partial(_mapped, second), values)
            subset_of = None
        else:
            select = _Selection.of(module, reduction.rows)
            carried, subset_of = (select.all, select.all, select.all), select
        new = carried[2]({key: parameter.detach() for key, parameter in parameters.items()})
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new.values()):
            raise NumericalError("the reduced scan has NaN or infinite weights, expected finite values")
        tensors = {key: tensor.to(parameters[key]) for key, tensor in new.items()}
        return LayerEdit(order, reduction.order, tensors, *carried, subset_of)

    def blank(self, module: nn.Module, rank: int) -> dict[str, Tensor]:
        parameters = plain_parameters(module, self.parameters(module))
        if _projected(module):
            return {key: map_.new_zeros(map_.shape[0], rank, map_.shape[2]) for key, map_ in parameters.items()}
        sizes = layout(module)
        more = 2 * sizes.groups * (rank - sizes.features)
        shapes = {key: (len(old) + more, *old.shape[1:]) for key, old in parameters.items()}
        if "init_states" in parameters:
            shapes["init_states"] = (*parameters["init_states"].shape[:2], rank)
        return {key: old.new_zeros(shapes[key]) for key, old in parameters.items()}

    def _checked(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """What the scan depends on and what changes, finite.

        Raises:
            ModelError, NumericalError: a parameter is missing or not finite, or the channels do not divide into heads.
        """
        parameters = plain_parameters(module, (*SCAN, *self.parameters(module)), name)
        check_finite(module, parameters, name)
        check_finite(module, {"exp(A_log)": parameters["A_log"].detach().double().exp()}, name)
        if getattr(module, "process_group", None) is not None:
            raise ModelError(f"{label(module, name)}: its heads lie on several processes (process_group), expected one")
        sizes, conv = layout(module), module.get_submodule("conv1d")
        channels = next(conv.parameters()).shape[0]
        if sizes.heads % sizes.groups or sum(sizes.convolved) != channels:
            got = f"{channels} channels of conv1d for {sizes.heads} heads of {sizes.headdim} in {sizes.groups} groups"
            raise ModelError(f"{label(module, name)}: {got}, expected those of x and, for every group, as many of B as of C")
        return parameters

    def _white(self, module: nn.Module, name: str) -> MatrixMoments:
        """Moments on white noise of unit variance."""
        weight = next(p for p in module.get_submodule("in_proj").parameters() if p.dim() == 2)
        noise = torch.randn(*WHITE, weight.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        meter = self.meter(module, name, WHITE[0], None, 0)
        meter.looks = WHITE[0] * WHITE[1] // 16
        meter.observe(module, (noise.to(weight),), {}, None)
        return meter.result(name)


@dataclass(frozen=True)
class _Selection:
    """Cuts what belongs to B and C down to the kept channels of every group.

    Attributes:
        rows, channels: of the projection, and of the convolution.
        states: (H, r), of the states of every head.
    """

    rows: Tensor
    channels: Tensor
    states: Tensor

    @classmethod
    def of(cls, module: nn.Module, kept: Tensor) -> _Selection:
        """For the kept channels (G, r) of each group."""
        sizes = layout(module)
        first = torch.arange(sizes.groups, device=kept.device)[:, None] * sizes.features
        inside = (first + kept).flatten()
        x, B, _ = sizes.convolved
        channels = torch.cat([torch.arange(x, device=kept.device), x + inside, x + B + inside])
        total = own_parameter(module, "in_proj.weight").shape[0]
        begin = total - sizes.heads - sum(sizes.convolved)
        everything = torch.arange(total, device=kept.device)
        rows = torch.cat([everything[:begin], begin + channels, everything[total - sizes.heads :]])
        return cls(rows, channels, kept.repeat_interleave(sizes.heads // sizes.groups, 0))

    def __call__(self, key: str, value: Tensor) -> Tensor:
        """A tensor like the parameter of that name, with the kept channels alone."""
        if key == "init_states":
            index = self.states.to(value.device)[:, None].expand(-1, value.shape[1], -1)
            return value.gather(2, index)
        return value[(self.rows if key.startswith("in_proj.") else self.channels).to(value.device)]

    def all(self, tensors: TensorMap) -> dict[str, Tensor]:
        """All of a layer's tensors, in float64."""
        return {key: self(key, value.double()) for key, value in tensors.items()}


def _projected(module: nn.Module) -> bool:
    """Whether maps stand between the activation and the scan."""
    return all(module._parameters.get(name) is not None for name in MAPS)


def _mapped(maps: TensorMap, tensors: TensorMap) -> dict[str, Tensor]:
    return {key: maps[key].to(tensors[key].device) @ tensors[key].double() for key in MAPS}


def _multipliers(module: nn.Module, before: Layout, after: Layout) -> Tensor:
    """FalconH1Mixer's vector of multipliers behind the projection at other sizes: one number for B and one for C.

    Raises:
        ModelError: they are not.
    """
    vector = module._buffers["mup_vector"]
    assert vector is not None
    begin = vector.shape[-1] - before.heads - 2 * before.convolved[1]
    front, B, C, dt = vector.split([begin, before.convolved[1], before.convolved[1], before.heads], -1)
    if not (bool((B == B[..., :1]).all()) and bool((C == C[..., :1]).all())):
        raise ModelError(f"{label(module)}: mup_vector differs between channels of B or of C, expected one number for each")
    size = after.convolved[1]
    return torch.cat([front, *(part[..., :1].expand(*part.shape[:-1], size) for part in (B, C)), dt], -1)
