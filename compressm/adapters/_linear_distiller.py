"""What is trained of a linear attention layer that has lost channels: what makes queries, keys and the decays of channels.

Values, decays of heads and the output's gate are what they were.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import _linear_mixer as mixers
from compressm.adapters import _rotary as rotary
from compressm.adapters._distilling import RATE, MixerDistiller, projection_rate
from compressm.adapters.base import Distiller, LayerEdit, TensorMap
from compressm.kernels import causal_conv1d, linear_attention
from compressm.layers._plain import plain
from compressm.layers.mamba2_mixer import without_padding
from compressm.layers.mamba_mixer import plain_convolution

PROJECTIONS = ("q_proj", "k_proj")


def linear_distiller(module: nn.Module, edit: LayerEdit) -> Distiller | None:
    """Trains all of an edit.

    Args:
        module: the layer as it is, with flash-linear-attention's names.
        edit: what it becomes.

    Returns:
        None where the edit changes nothing that makes queries and keys, or where that is more than its parameters say (hooks,
        subclasses), so that it cannot be had alone.
    """
    names = mixers.sections(module).keys()
    if not edit.tensors.keys() >= names:
        return None
    modules = [module.get_submodule(part) for part in {name.rpartition(".")[0] for name in names}]
    if mixers.of_channels(module) and not plain(module.get_submodule("gk_proj"), nn.Sequential):
        return None
    whole = all(plain(part, nn.Linear) or plain_convolution(part) for part in modules)
    return _LinearDistiller(module, edit) if whole else None


class _LinearDistiller(MixerDistiller):
    """The layer around queries, keys and the decays of channels."""

    def __init__(self, module: Any, edit: LayerEdit) -> None:
        super().__init__(module, edit, PROJECTIONS[0], module.o_proj)
        self.frequencies = rotary.kept_frequencies(module, edit.attributes)
        self.leaves = {name: self.train(name) for name in edit.tensors}
        rate = projection_rate(self.leaves[f"{PROJECTIONS[0]}.weight"])
        self.groups = [
            {"params": [leaf], "lr": rate if name.startswith(PROJECTIONS) else RATE} for name, leaf in self.leaves.items()
        ]

    def around(self, hidden: Tensor, real: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        q, k = mixers.features(self.module, hidden, real)
        if self.frequencies is not None:
            q, k = rotary.turned(self.module, q), rotary.turned(self.module, k)
        g, gate = mixers.log_decays(self.module, hidden), mixers.output_gate(self.module, hidden)
        fixed = {"hidden": without_padding(hidden, real).float(), "v": mixers.values(self.module, hidden, real).float()}
        if gate is not None:
            fixed["gate"] = gate.float()
        if mixers.of_channels(self.module):
            fixed["narrow"] = self.module.gk_proj[:-1](hidden).float()
        elif g is not None:
            fixed["g"] = g.float().expand(*hidden.shape[:2], -1)
        return fixed, self._attend(fixed, q.float(), k.float(), None if g is None else g.float())

    def run(self, fixed: TensorMap) -> Tensor:
        q, k = (self._feature(letter, fixed["hidden"]) for letter in "qk")
        return self._attend(fixed, q, k, self._log_decays(fixed))

    def _feature(self, letter: str, hidden: Tensor) -> Tensor:
        """Queries or keys (sequences, steps, heads of them, channels), as the recurrence takes them."""
        x: Any = self._linear(f"{letter}_proj", hidden)
        if mixers.convolved(self.module):
            conv = f"{letter}_conv1d"
            x = causal_conv1d(x.mT, self.leaves[f"{conv}.weight"][:, 0], self.leaves.get(f"{conv}.bias"), activation="silu")
            x = x.mT
        x = x.unflatten(-1, (-1, self.edit.rank_after))
        return x if self.frequencies is None else rotary.turned_by(x, self.frequencies)

    def _log_decays(self, fixed: TensorMap) -> Tensor | None:
        if not mixers.of_channels(self.module):
            return fixed.get("g")
        g = mixers.of_logits(self.module, self._linear("gk_proj.1", fixed["narrow"]))
        return g.unflatten(-1, (-1, self.edit.rank_after))

    def _linear(self, part: str, x: Tensor) -> Tensor:
        return F.linear(x, self.leaves[f"{part}.weight"], self.leaves.get(f"{part}.bias"))

    def _attend(self, fixed: TensorMap, q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
        """What the output projection gets of the recurrence, (sequences, steps, H V)."""
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, fixed["v"]))
        normalize = getattr(self.module, "do_feature_map_norm", False)
        out, _ = linear_attention(q, k, v, g, getattr(self.module, "scale", None), normalize=normalize)
        return mixers.normed(self.module, out, fixed.get("gate")).float()
