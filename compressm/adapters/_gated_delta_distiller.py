"""What is trained of a gated delta rule mixer that has lost states: what makes keys and queries.

Values, decays, beta and the output's gate are what they were; where every channel has a decay, rows of the states decay by
their map of the keys.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters._distilling import MAP_RATE, RATE, MixerDistiller, projection_rate
from compressm.adapters.base import Distiller, LayerEdit, TensorMap
from compressm.adapters.parameters import precision
from compressm.kernels import causal_conv1d, gated_delta_rule
from compressm.layers._plain import plain
from compressm.layers.gated_delta_mixer import (
    contraction,
    convolve_all,
    layout,
    normed,
    of_channels,
    output_projection,
    project,
    rule_inputs,
    shared_decays,
    unit,
)
from compressm.layers.mamba2_mixer import without_padding
from compressm.layers.mamba_mixer import SILU, plain_convolution

MAPS = ("k_map", "q_map")
Rows = Mapping[str, Sequence[Tensor]]  # by parameter, (G, r) each: those of queries and then of keys, or of what its name says


def gated_delta_distiller(module: nn.Module, edit: LayerEdit, rows: Rows) -> Distiller | None:
    """Trains the maps of an edit, or its rows of the projections and taps of the convolutions where it has no maps.

    Args:
        module: the mixer as it is.
        edit: what it becomes.
        rows: of the edit's tensors without maps, which make queries and keys.

    Returns:
        None where the edit has neither, or where projections or convolutions are more than their parameters say (hooks,
        subclasses), so that the part of queries and keys cannot be had alone.
    """
    if edit.tensors.keys() >= set(MAPS):
        return _Maps(module, edit)
    if not edit.tensors.keys() >= rows.keys():
        return None
    parts = {name.rpartition(".")[0] for name in rows}
    modules = [module.get_submodule(part) for part in parts]
    whole = all(plain_convolution(part) if isinstance(part, nn.Conv1d) else plain(part, nn.Linear) for part in modules)
    return _Rows(module, edit, rows) if whole else None


class _GatedDeltaDistiller(MixerDistiller):
    """The mixer around queries and keys."""

    def __init__(self, module: Any, edit: LayerEdit) -> None:
        self.sizes = layout(module)
        names = ("in_proj_qkvz", "in_proj_qkv", "q_proj")
        projection = next(name for name in names if name in module._modules)
        super().__init__(module, edit, projection, output_projection(module))

    def around(self, hidden: Tensor, real: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        mixed, z, b, a = project(self.module, hidden, real)
        convolved = convolve_all(self.module, mixed)
        inputs = rule_inputs(self.module, convolved, b, a)
        q, k, v, g, beta = (part.float() for part in inputs)
        fixed = {
            "v": v,
            "g": self._decays(a, g),
            "beta": beta,
            **({} if z is None else {"z": z.float()}),
            **self._sources(hidden, real, convolved),
        }
        return fixed, self._rule(fixed, q, k, g, self.sizes.features)

    def run(self, fixed: TensorMap) -> Tensor:
        return self._rule(fixed, *self._features(fixed), self._channels)

    @property
    @abstractmethod
    def _channels(self) -> int:
        """Of a query in front of maps, in the new mixer."""

    @abstractmethod
    def _decays(self, a: Tensor, g: Tensor) -> Tensor:
        """What the new mixer's log decays are made of.

        Args:
            a, g: what the old one's are made of, and these.
        """

    @abstractmethod
    def _sources(self, hidden: Tensor, real: Tensor, convolved: Tensor) -> dict[str, Tensor]:
        """What queries and keys are computed from."""

    @abstractmethod
    def _features(self, fixed: TensorMap) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (sequences, steps, G, states) and log decays, as the rule takes them."""

    def _rule(self, fixed: TensorMap, q: Tensor, k: Tensor, g: Tensor, channels: int) -> Tensor:
        """What the output projection gets from the rule, (sequences, steps, HV V)."""
        out, _ = gated_delta_rule(q, k, fixed["v"], g, fixed["beta"], scale=channels**-0.5)
        norm = getattr(self.module, "o_norm", None)
        if isinstance(norm, nn.RMSNorm):  # which takes the precision of its weight
            out = out.to(precision(norm, out.dtype))
        return normed(self.module, out, fixed.get("z")).float()


class _Rows(_GatedDeltaDistiller):
    """The rows of queries and keys in the projections and their taps and biases in the convolutions."""

    def __init__(self, module: nn.Module, edit: LayerEdit, rows: Rows) -> None:
        super().__init__(module, edit)
        self.rows = rows
        projections, convolutions = ([n for n in rows if ("conv1d" in n) == taps] for taps in (False, True))
        self.leaves = {name: self.train(name, torch.cat([part.flatten() for part in rows[name]])) for name in rows}
        rates = projection_rate(self.leaves[projections[0]]), RATE
        self.groups = [
            {"params": [self.leaves[name] for name in names], "lr": rate}
            for names, rate in zip((projections, convolutions), rates, strict=True)
        ]

    @property
    def _channels(self) -> int:
        return self.edit.rank_after

    def _decays(self, a: Tensor, g: Tensor) -> Tensor:
        """Where channels have decays of their own (sequences, steps, HV, K), those of the channels that stay."""
        if g.dim() < 4 or self.edit.subset is None:
            return g
        kept = self.edit.subset("dt_bias", g.flatten(2).movedim(-1, 0))
        return kept.movedim(0, -1).unflatten(-1, (self.sizes.heads, -1))

    def _sources(self, hidden: Tensor, real: Tensor, convolved: Tensor) -> dict[str, Tensor]:
        return {"hidden": without_padding(hidden, real).float()}

    def _features(self, fixed: TensorMap) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, taps, conv_bias = (
            self._joined(convolution, leaf) for convolution in (False, True) for leaf in ("weight", "bias")
        )
        assert weight is not None
        assert taps is not None
        silu = getattr(self.module, "activation", "silu") in SILU
        both: Any = F.linear(fixed["hidden"], weight, bias)
        both = causal_conv1d(both.mT, taps[:, 0], conv_bias, activation="silu" if silu else None)
        both = (both if silu else self.module.act(both)).mT
        q, k = unit(both.unflatten(-1, (2, self.sizes.key_heads, self.edit.rank_after))).unbind(-3)
        return q, k, fixed["g"]

    def _joined(self, convolution: bool, leaf: str) -> Tensor | None:
        """Of queries and then of keys; None if there is no such parameter."""
        found = [self.leaves[name] for name in self.rows if ("conv1d" in name) == convolution and name.endswith(leaf)]
        return torch.cat(found) if found else None


class _Maps(_GatedDeltaDistiller):
    """The maps behind the norm to length one; that of keys makes none longer."""

    def __init__(self, module: nn.Module, edit: LayerEdit) -> None:
        super().__init__(module, edit)
        self.maps = [self.train(key) for key in MAPS]
        self.groups = [{"params": self.maps, "lr": MAP_RATE}]

    @property
    def _channels(self) -> int:
        return self.sizes.features

    def _sources(self, hidden: Tensor, real: Tensor, convolved: Tensor) -> dict[str, Tensor]:
        both = convolved[..., : 2 * self.sizes.convolved[0]].unflatten(-1, (2, self.sizes.key_heads, self.sizes.features))
        return {"features": unit(both).float()}

    def _decays(self, a: Tensor, g: Tensor) -> Tensor:
        return a.float() if of_channels(self.module) else g

    def _features(self, fixed: TensorMap) -> tuple[Tensor, Tensor, Tensor]:
        (q, k), g = fixed["features"].unbind(-3), fixed["g"]
        k_map, q_map = contraction(self.maps[0]), self.maps[1]
        q, k = torch.einsum("...gn,grn->...gr", q, q_map), torch.einsum("...gn,grn->...gr", k, k_map)
        return q, k, shared_decays(g, k_map) if of_channels(self.module) else g
