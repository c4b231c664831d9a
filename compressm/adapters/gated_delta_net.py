"""Gated delta rule mixers: ours, flash-linear-attention's GatedDeltaNet and those of transformers' models.

Heads of values share the queries and keys of a group, K channels each that come out of the projection, the convolution, its
activation and a norm to length one.  A key reads the state that it erases from, so that keys count as queries as well, and no
map may make them longer (see :func:`compressm.control.erasing_projection`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters._gated_delta_distiller import gated_delta_distiller
from compressm.adapters._gated_delta_meter import GatedDeltaMeter
from compressm.adapters.base import Distiller, LayerEdit
from compressm.adapters.matrix import MatrixAdapter, Rows, check_vectors
from compressm.adapters.parameters import expansion, label, plain_parameters, precision
from compressm.control import MatrixMoments, MatrixReduction, erasing_projection
from compressm.errors import ModelError
from compressm.layers.gated_delta_mixer import DeltaLayout, layout

GATED_DELTA_NETS = (  # of transformers, classes whose forwards are near-copies of one another
    "transformers.models.olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet",
    "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet",
    "transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet",
)
CONVOLUTIONS = ("conv1d", "q_conv1d", "k_conv1d")
INDEPENDENT = (
    "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "q_proj", "k_proj", "v_proj", "a_proj",
    "b_proj", "g_proj", "conv1d", "q_conv1d", "k_conv1d", "v_conv1d", "dt_bias", "A_log", "norm", "o_norm", "out_proj",
    "o_proj",
)  # fmt: skip


class GatedDeltaNetAdapter(MatrixAdapter):
    """Channels of keys and queries of the gated delta rule, and the maps ``k_map`` and ``q_map``.

    Without calibration data the layer's input counts as white noise of unit variance.
    """

    papers = ("yang2025gated",)
    optional = ("k_map", "q_map")
    projections = ("in_proj_qkvz", "in_proj_qkv", "q_proj")
    multiple = 16  # the tensor cores of GPUs take 16 at a time
    remedy = "transformers' mixers have some after compressm.integrations.transformers.accelerate_(model)"
    distils = True

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return INDEPENDENT

    def shape(self, module: nn.Module) -> tuple[int, int]:
        plain_parameters(module, self.recurrence)
        sizes = layout(module)
        return sizes.key_heads, sizes.features

    def convolution(self, module: nn.Module) -> str:
        return next(part for part in CONVOLUTIONS if part in module._modules)

    def projection(self, moments: MatrixMoments, rank: int) -> MatrixReduction:
        return erasing_projection(moments, rank)

    def embeddings(self, reduction: MatrixReduction) -> tuple[Tensor, Tensor]:
        """The rows of E_k are orthonormal, and the new state is E_k times the old one: gradients by both change like it."""
        return reduction.key, reduction.key

    def rows(self, module: nn.Module) -> Mapping[str, Rows]:
        return self._rows_at(module, layout(module))

    def distiller(self, module: nn.Module, edit: LayerEdit) -> Distiller | None:
        return gated_delta_distiller(module, edit, self._rows_at(module, layout(module)._replace(features=edit.rank_after)))

    def _rows_at(self, module: nn.Module, sizes: DeltaLayout) -> Mapping[str, Rows]:
        """Those of a layer of other sizes."""
        keys = sizes.convolved[0]
        index = torch.arange(keys, device="cpu").view(sizes.key_heads, sizes.features)
        both = index, keys + index
        found: dict[str, Rows] = {}
        if "in_proj_qkvz" in module._modules:
            share = sizes.heads // sizes.key_heads
            block = 2 * sizes.features + 2 * share * sizes.values
            inside = torch.arange(sizes.key_heads, device="cpu")[:, None] * block + index[:1]
            found["in_proj_qkvz"] = (inside, inside + sizes.features)
        elif "in_proj_qkv" in module._modules:
            found["in_proj_qkv"] = both
        else:
            found["q_proj"] = found["k_proj"] = (index,)
        if "conv1d" in module._modules:
            found["conv1d"] = both
        else:
            found["q_conv1d"] = found["k_conv1d"] = (index,)
        biased = {part: getattr(module.get_submodule(part), "bias", None) is not None for part in found}
        keys_of = {part: (f"{part}.weight", f"{part}.bias") if biased[part] else (f"{part}.weight",) for part in found}
        return {key: found[part] for part, names in keys_of.items() for key in names}

    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """``rank`` numbers a channel of values, float32 unless A_log is wider, and the last inputs of the convolutions."""
        A_log, sizes = plain_parameters(module, self.recurrence)[self.recurrence[-1]], layout(module)
        conv = module.get_submodule(self.convolution(module))
        width: int = vars(conv)["kernel_size"][0]
        inner = sum(sizes.convolved if self.maps(module) else sizes._replace(features=rank).convolved)
        scan, window = torch.promote_types(A_log.dtype, torch.float32), precision(conv, torch.float32)
        return sizes.heads * sizes.values * rank * scan.itemsize + inner * width * window.itemsize

    def attributes(self, module: nn.Module, rank: int) -> dict[str, Any]:
        if self.maps(module):
            return {}
        sizes = layout(module)
        keys, inner = sizes.key_heads * rank, sum(sizes._replace(features=rank).convolved)
        named = {"head_k_dim": rank, "head_dim": rank, "key_dim": keys, "conv_dim": inner}
        own: dict[str, Any] = {name: size for name, size in named.items() if name in vars(module)}
        if "expand_v" in vars(module):
            own["expand_v"] = expansion(sizes.values, rank)
        channels = {"conv1d": inner, "q_conv1d": keys, "k_conv1d": keys}
        for part in (part for part in channels if part in module._modules):
            own |= dict.fromkeys((f"{part}.{name}" for name in ("in_channels", "out_channels", "groups")), channels[part])
            if "hidden_size" in vars(module.get_submodule(part)):  # flash-linear-attention's short convolutions
                own[f"{part}.hidden_size"] = channels[part]
        lost = 2 * sizes.key_heads * (sizes.features - rank)
        for part in ("in_proj_qkvz", "in_proj_qkv"):
            if part in module._modules:
                own[f"{part}.out_features"] = vars(module.get_submodule(part))["out_features"] - lost
        return own | {f"{part}.out_features": keys for part in ("q_proj", "k_proj") if part in module._modules}

    def check_rank(self, module: nn.Module, rank: int) -> None:
        """Raise ArgumentError where the convolution's channels would no longer divide by 8."""
        if not self.foreign or self.maps(module):
            return
        sizes = layout(module)
        now, then = sum(sizes.convolved), sum(sizes._replace(features=rank).convolved)
        check_vectors(module, rank, sizes.key_heads, {"channels in its convolution": (now, then)})

    def meter(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> GatedDeltaMeter:
        device = self.checked(module, name)[self.recurrence[-1]].device
        return GatedDeltaMeter(self.shape(module)[0], self.rank(module), self.projected_by(module), device)

    def check_sizes(self, module: nn.Module, name: str) -> None:
        sizes = layout(module)
        if sizes.heads % sizes.key_heads or sizes.key_heads * sizes.features != sizes.convolved[0]:
            got = f"{sizes.heads} heads of values for {sizes.key_heads} of keys with {sizes.convolved[0]} channels together"
            raise ModelError(f"{label(module, name)}: {got}, expected numbers that divide")
