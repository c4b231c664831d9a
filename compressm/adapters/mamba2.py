"""Mamba-2 mixers: ours, mamba_ssm's and those of transformers' models (in_proj, conv1d, dt_bias, A_log, D, out_proj).

Heads of a group share B_t and C_t, N channels each that come out of the projection, the convolution and its activation; the
state of a head decays by one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._mamba2_distiller import mamba2_distiller
from compressm.adapters._mamba2_meter import Mamba2Meter
from compressm.adapters.base import Distiller, LayerEdit
from compressm.adapters.matrix import WHITE, MatrixAdapter, Rows, check_vectors
from compressm.adapters.parameters import label, own_parameter, plain_parameters, precision
from compressm.control import MatrixMoments, MatrixReduction, projection
from compressm.errors import ModelError
from compressm.layers.mamba2_mixer import Layout, layout

TRANSFORMERS = (  # classes whose forwards are near-copies of one another
    "transformers.models.bamba.modeling_bamba.BambaMixer",
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer",
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer",
    "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer",
    "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer",
    "transformers.models.zamba2.modeling_zamba2.Zamba2MambaMixer",
)
INDEPENDENT = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj", "mup_vector")


class Mamba2Adapter(MatrixAdapter):
    """Mamba-2's channels of B (keys) and C (queries), and its maps ``B_map`` and ``C_map``.

    Without calibration data the layer's input counts as white noise of unit variance.
    """

    papers = ("dao2024transformers",)
    optional = ("B_map", "C_map")
    last_axes = ("init_states",)
    multiple = 16  # Triton kernels of mamba_ssm are no faster in between
    remedy = "transformers' mixers have some after compressm.integrations.transformers.accelerate_(model)"
    distils = True

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return INDEPENDENT

    def obstacle(self, module: nn.Module) -> str:
        learned = module._parameters.get("init_states") is not None
        return "whose initial states are learned" if learned else super().obstacle(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        plain_parameters(module, ("conv1d.weight", "A_log"))
        sizes = layout(module)
        return sizes.groups, sizes.features

    def convolution(self, module: nn.Module) -> str:
        return "conv1d"

    def rows(self, module: nn.Module) -> Mapping[str, Rows]:
        sizes, index = layout(module), torch.arange(layout(module).convolved[1], device="cpu")
        index = index.view(sizes.groups, sizes.features)
        inner, before = sum(sizes.convolved), sizes.convolved[0]
        result: dict[str, Rows] = {}
        for part in ("in_proj", "conv1d"):
            for key in (f"{part}.weight", f"{part}.bias"):
                if key.endswith("weight") or getattr(module.get_submodule(part), "bias", None) is not None:
                    begin = before
                    if part == "in_proj":
                        begin += own_parameter(module, key).shape[0] - sizes.heads - inner
                    result[key] = (begin + index, begin + index.numel() + index)
        return result

    def projection(self, moments: MatrixMoments, rank: int) -> MatrixReduction:
        return projection(moments, rank)

    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """``rank`` numbers a channel for the scan, float32 unless A_log is wider, and the last inputs of the convolution."""
        A_log, conv = plain_parameters(module, ("A_log",))["A_log"], module.get_submodule("conv1d")
        named = [vars(module)[name] for name in ("d_conv", "conv_kernel_size") if name in vars(module)]
        width: int = named[0] if named else vars(conv)["kernel_size"][0]
        sizes = layout(module)
        inner = sum(sizes.convolved if self.maps(module) else sizes._replace(features=rank).convolved)
        scan, window = torch.promote_types(A_log.dtype, torch.float32), precision(conv, torch.float32)
        return sizes.channels * rank * scan.itemsize + inner * width * window.itemsize

    def attributes(self, module: nn.Module, rank: int) -> dict[str, Any]:
        if self.maps(module):
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

    def check_rank(self, module: nn.Module, rank: int) -> None:
        """Raise ArgumentError where the convolution's channels or the projection's rows would no longer divide by 8."""
        if not self.foreign or self.maps(module):
            return
        sizes, rows = layout(module), own_parameter(module, "in_proj.weight").shape[0]
        now, then = sum(sizes.convolved), sum(sizes._replace(features=rank).convolved)
        sides = {"channels of conv1d": (now, then), "rows of in_proj": (rows, rows + then - now)}
        check_vectors(module, rank, sizes.groups, sides)

    def meter(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> Mamba2Meter:
        device = self.checked(module, name)["A_log"].device
        return Mamba2Meter(layout(module).groups, self.rank(module), "in_proj", device, sequences, rows_per_state, seed)

    def distiller(self, module: nn.Module, edit: LayerEdit) -> Distiller | None:
        return mamba2_distiller(module, edit, self.attributes(module, edit.rank_after).get("mup_vector"))

    def check_sizes(self, module: nn.Module, name: str) -> None:
        if getattr(module, "process_group", None) is not None:
            raise ModelError(f"{label(module, name)}: its heads lie on several processes (process_group), expected one")
        sizes, conv = layout(module), module.get_submodule("conv1d")
        channels = next(conv.parameters()).shape[0]
        if sizes.heads % sizes.groups or sum(sizes.convolved) != channels:
            got = f"{channels} channels of conv1d for {sizes.heads} heads of {sizes.headdim} in {sizes.groups} groups"
            raise ModelError(f"{label(module, name)}: {got}, expected those of x and, for every group, as many of B as of C")

    def white_meter(self, module: nn.Module, name: str) -> Mamba2Meter:
        meter = self.meter(module, name, WHITE[0], None, 0)
        meter.looks = WHITE[0] * WHITE[1] // 16
        return meter


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
