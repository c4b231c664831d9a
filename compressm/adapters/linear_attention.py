"""Linear attention: ours, flash-linear-attention's layers and transformers' xLSTM.

Queries and keys are linear in the token, so that a reduction goes into their projections and the layer stays one of its class:

* where all channels of a head decay alike, S_t = a_t S_{t-1} + k_t v_t^T, any maps of keys and queries give such a recurrence
  again, and the best pair is absorbed;
* where every channel has a decay of its own, a subset of the channels stays, and a map of the queries is absorbed.

Where a convolution with its activation stands behind the projections no map can be absorbed, and a subset stays.  Where queries
and keys turn with their position, a subset of the pairs that turn together stays, and turns as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressm.adapters import _linear_mixer as mixers
from compressm.adapters import _rotary as rotary
from compressm.adapters._linear_distiller import linear_distiller
from compressm.adapters._linear_meter import DecayingMeter, LinearMeter, TurningMeter
from compressm.adapters.base import Adapter, Analysis, Distiller, LayerEdit, Meter, TensorMap
from compressm.adapters.matrix import WHITE, on_white_noise
from compressm.adapters.parameters import check_finite, expansion, label, plain_parameters, precision
from compressm.control import (
    MatrixMoments,
    MatrixReduction,
    check_pairs,
    pair_spectrum,
    predicted_subset,
    projection,
    subset,
    subset_spectrum,
    turning_spectrum,
    turning_subset,
)
from compressm.errors import ModelError, NumericalError, bad_argument

INDEPENDENT = (
    "q_proj", "k_proj", "v_proj", "g_proj", "gk_proj", "o_proj", "q_conv1d", "k_conv1d", "v_conv1d", "g_norm",
    "g_norm_swish_gate", "norm", "log_decay", "rotary", "inv_freq",
    "q", "k", "v", "qkv_opreact", "ogate_preact", "igate_preact", "fgate_preact", "ifgate_preact", "multihead_norm", "out_proj",
)  # fmt: skip
CACHED = 64  # channels of all heads of which transformers' xLSTM makes its caches a multiple
Reduce = Callable[[MatrixMoments, int], MatrixReduction]


@dataclass(frozen=True, eq=False)
class LinearAnalysis(Analysis[MatrixReduction]):
    """Second moments of a linear recurrence; squares of the spectrum are energies of its output.

    Attributes:
        spectrum, reduction: of moments.
        together: so many states go or stay together.
    """

    moments: MatrixMoments
    gramians: str
    spectrum: Callable[[MatrixMoments], Tensor]
    reduction: Reduce
    together: int = 1
    convention: str = "selective"
    bounded: bool = False
    hsv: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hsv", self.spectrum(self.moments))

    def modes(self, order: int) -> int:
        return -(-order // self.together) * self.together

    def reduce(self, rank: int) -> MatrixReduction:
        reduction = self.reduction(self.moments, rank)
        if not bool(torch.isfinite(reduction.key).all() and torch.isfinite(reduction.query).all()):
            raise NumericalError("the maps of the reduced layer are not finite, expected finite second moments of q and k")
        return reduction

    def spectrum_after(self, reduction: MatrixReduction) -> Tensor:
        return self.hsv[: reduction.order]


class LinearAttentionAdapter(Adapter[MatrixReduction]):
    """Channels of a head's keys and queries.

    Without calibration data the layer's input counts as white noise of unit variance.

    Args:
        foreign: the layer belongs to another library, whose kernels want numbers of channels that divide well.
        distils: whether its states are those of flash-linear-attention's layers, without a normaliser of their own.
        papers: keys in references.bib.
    """

    conventions = ("real",)
    multiple = 16  # the tensor cores of GPUs take 16 at a time

    def __init__(self, *papers: str, foreign: bool = False, distils: bool = True) -> None:
        self.papers, self.foreign, self.distils = papers, foreign, distils

    def independent(self, module: nn.Module) -> tuple[str, ...]:
        return INDEPENDENT

    def parameters(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(mixers.sections(module))

    def rank(self, module: nn.Module) -> int:
        return mixers.layout(module).features

    def state_bytes(self, module: nn.Module, rank: int) -> int:
        """``rank`` numbers a channel of values, float32 unless the weights are wider, xLSTM's normaliser and its stabiliser,
        and the last inputs of convolutions."""
        sizes, part = mixers.layout(module), mixers.projections(module)[0]
        weights = precision(module.get_submodule(part), torch.float32)
        numbers = sizes.heads * rank * sizes.values
        if "mlstm_backend" in module._modules:
            numbers += sizes.heads * (rank + 1)
        window = 0
        if mixers.convolved(module):
            channels = (sizes.heads + sizes.key_heads) * rank + sizes.key_heads * sizes.values
            window = channels * vars(module.get_submodule("q_conv1d"))["kernel_size"][0] * weights.itemsize
        return numbers * torch.promote_types(weights, torch.float32).itemsize + window

    def round_to(self, module: nn.Module) -> int:
        return math.lcm(self.multiple if self.foreign else 1, self._step(module), _together(module))

    def check_rank(self, module: nn.Module, rank: int) -> None:
        """Raise ArgumentError for half a pair, and where transformers' xLSTM would make caches of another size than layers."""
        if rotary.turning(module):
            check_pairs(rank)
        if rank % (step := self._step(module)):
            raise bad_argument(
                "rank",
                got=f"{rank} channels a head for a {type(module).__name__} of {mixers.layout(module).heads} heads",
                expected=f"a multiple of {step}: its library rounds those of all heads up to a multiple of {CACHED}",
                remedy="Pass multiple_of=1 where no cache is used",
            )

    def _step(self, module: nn.Module) -> int:
        cached = "mlstm_backend" in module._modules
        return CACHED // math.gcd(CACHED, mixers.layout(module).heads) if cached else 1

    @torch.no_grad()
    def slowest(self, module: nn.Module) -> float:
        """At a token of zeros where decays depend on it."""
        weight = self._checked(module, "")[self.parameters(module)[0]]
        decays = mixers.log_decays(module, weight.new_zeros(1, 1, weight.shape[1]))
        return 1.0 if decays is None else float(decays.double().exp().max())

    @torch.no_grad()
    def analyse(self, module: nn.Module, name: str, convention: str, measured: MatrixMoments | None) -> LinearAnalysis:
        self._checked(module, name)
        if convention not in self.conventions:
            raise ModelError(f"{label(module, name)}: recipe 'paper' has none for matrix-valued states, expected 'default'")
        gramians = "data-free" if measured is None else "data"
        if measured is None:
            meter = self.meter(module, name, WHITE[0], 1, 0)
            measured = on_white_noise(meter, module, mixers.projections(module)[0], name)
        spectrum: Callable[[MatrixMoments], Tensor]
        reduction: Reduce
        if rotary.turning(module):
            spectrum, reduction = turning_spectrum, turning_subset
        elif mixers.convolved(module):
            spectrum, reduction = subset_spectrum, subset
        elif mixers.of_channels(module):
            spectrum, reduction = pair_spectrum, predicted_subset
        else:
            spectrum, reduction = pair_spectrum, _absorbed
        return LinearAnalysis(measured, gramians, spectrum, reduction, _together(module))

    def meter(self, module: nn.Module, name: str, sequences: int, rows_per_state: int | None, seed: int) -> Meter:
        device = next(iter(self._checked(module, name).values())).device
        sizes, projection_name = mixers.layout(module), mixers.projections(module)[0]
        sampled = sequences, rows_per_state, seed
        if rotary.turning(module):
            return TurningMeter(sizes.heads, sizes.features, projection_name, device, *sampled)
        if mixers.of_channels(module):
            return DecayingMeter(sizes.heads, sizes.features, projection_name, device, *sampled)
        return LinearMeter(sizes.key_heads, sizes.features, projection_name, device)

    @torch.no_grad()
    def edit(self, module: nn.Module, reduction: MatrixReduction) -> LayerEdit:
        parameters, sizes = plain_parameters(module, self.parameters(module)), mixers.layout(module)
        key, query = reduction.key, reduction.query
        beside: dict[str, Any] = {}
        if rotary.turning(module):
            assert reduction.rows is not None  # whole pairs, the same in all heads
            key, query = key[:1], query[:1]
            beside = rotary.kept(module, reduction.rows[0, : reduction.order // 2])
        scale = 1.0
        if mixers.rescaled(module) and not mixers.convolved(module):
            scale = math.sqrt(reduction.order / sizes.features)
        values: dict[str, Tensor] = {"k": key, "q": scale * query}
        chosen: dict[str, Tensor] | None = None
        # What a key is multiplied with, q_t, changes with E_q, and what a query is, S_t, with E_k.
        first = {"k": query, "q": key / scale}
        if reduction.rows is not None:
            chosen = dict.fromkeys("kqg", key)
            values["g"] = key
            first = {"k": key, "q": key / scale, "g": key}
        act = partial(_transformed, mixers.sections(module), sizes)
        carried = partial(act, first), partial(act, {kind: m.square() for kind, m in first.items()}), partial(act, values)
        new = carried[2]({name: parameter.detach() for name, parameter in parameters.items()})
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new.values()):
            raise NumericalError("the reduced layer has NaN or infinite weights, expected finite values")
        tensors = {name: tensor.to(parameters[name]) for name, tensor in new.items()}
        cut = None if chosen is None else partial(_cut, act, chosen)
        return LayerEdit(sizes.features, reduction.order, tensors, *carried, cut, beside)

    def distiller(self, module: nn.Module, edit: LayerEdit) -> Distiller | None:
        return linear_distiller(module, edit) if self.distils else None

    def blank(self, module: nn.Module, rank: int) -> dict[str, Tensor]:
        parameters = plain_parameters(module, self.parameters(module))
        return {
            name: parameters[name].new_zeros(length, *parameters[name].shape[1:])
            for name, length in self._lengths(module, rank).items()
        }

    def attributes(self, module: nn.Module, rank: int) -> dict[str, Any]:
        sizes, own = mixers.layout(module), vars(module)
        queries = sizes.heads * rank
        named: dict[str, Any] = {
            "head_k_dim": rank, "key_dim": queries, "key_dim_per_group": sizes.key_heads * rank, "qk_dim": queries
        }  # fmt: skip
        found: dict[str, Any] = {name: size for name, size in named.items() if name in own}
        lengths = self._lengths(module, rank)
        if "expand_k" in own:
            found["expand_k"] = expansion(queries, own["d_model" if "d_model" in own else "hidden_size"])
        for name, length in lengths.items():
            part, _, leaf = name.rpartition(".")
            settings = vars(module.get_submodule(part))
            names = ("out_channels", "in_channels", "groups", "hidden_size") if "conv1d" in part else ("out_features",)
            found |= {f"{part}.{name}": length for name in names if leaf == "weight" and name in settings}
        return found | (rotary.attributes(module, rank) if rotary.turning(module) else {})

    def as_stored(self, module: nn.Module, names: Collection[str]) -> dict[str, Any]:
        turns = rotary.turning(module) and not rotary.obstacle(module)
        return rotary.as_stored(module, names) if turns else {}

    def _lengths(self, module: nn.Module, rank: int) -> dict[str, int]:
        """Of the parameters' first axes at ``rank`` channels."""
        now = mixers.layout(module).features
        return {
            name: sum(count // now * rank if kind else count for kind, count in rows)
            for name, rows in mixers.sections(module).items()
        }

    def _checked(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """What changes, finite.

        Raises:
            ModelError, NumericalError: something stands in the place of a parameter or in the way, or is not finite.
        """
        if words := mixers.obstacle(module):
            raise ModelError(f"{label(module, name)} cannot have fewer channels of keys: {words}")
        parameters = plain_parameters(module, self.parameters(module), name)
        check_finite(module, dict(module.named_parameters()), name)
        sizes, expected = mixers.layout(module), self._lengths(module, self.rank(module))
        if sizes.heads % sizes.key_heads or any(len(parameters[key]) != length for key, length in expected.items()):
            got = f"{sizes.heads} heads of queries and {sizes.key_heads} of keys for {sizes.features} channels each"
            raise ModelError(f"{label(module, name)}: {got}, expected numbers that divide and the projections' rows")
        if mixers.of_channels(module) and sizes.heads != sizes.key_heads:
            raise ModelError(f"{label(module, name)}: heads share keys that decay by channels (num_kv_heads), expected none")
        return parameters


def _together(module: nn.Module) -> int:
    return 2 if rotary.turning(module) else 1


def _absorbed(moments: MatrixMoments, rank: int) -> MatrixReduction:
    return replace(projection(moments, rank), method="absorbed, balanced pair")


def _transformed(
    sections: mixers.Sections, sizes: mixers.LinearLayout, maps: TensorMap, tensors: TensorMap
) -> dict[str, Tensor]:
    """Tensors like the named parameters, in float64, their channels (heads, K) mapped by (key heads, r, K) of their kind."""
    result = {}
    for name, tensor in tensors.items():
        rows, parts = sections[name], []
        for (kind, _), part in zip(rows, tensor.double().split([count for _, count in rows]), strict=True):
            if kind:
                heads = part.reshape(-1, sizes.features, part[0].numel())
                map_ = maps[kind].to(part.device)
                part = (map_.repeat_interleave(len(heads) // len(map_), 0) @ heads).reshape(-1, *part.shape[1:])
            parts.append(part)
        result[name] = torch.cat(parts)
    return result


def _cut(act: Callable[..., Mapping[str, Tensor]], maps: TensorMap, name: str, tensor: Tensor) -> Tensor:
    return act(maps, {name: tensor})[name].to(tensor.dtype)
