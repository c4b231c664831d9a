"""How layer families read as systems, and which of their tensors change together."""

from __future__ import annotations

from compressm.adapters.base import Adapter, Analysis, Distiller, LayerEdit, Meter, Reduced
from compressm.adapters.delta_net import DeltaNetAdapter
from compressm.adapters.gated_delta_net import GATED_DELTA_NETS, GatedDeltaNetAdapter
from compressm.adapters.kimi_delta import KIMI_DELTAS, KimiDeltaAdapter, KimiDeltaAttentionAdapter
from compressm.adapters.linear_attention import LinearAttentionAdapter
from compressm.adapters.lru import LRUAdapter
from compressm.adapters.lti import LTIAdapter
from compressm.adapters.mamba import MambaAdapter
from compressm.adapters.mamba2 import TRANSFORMERS, Mamba2Adapter
from compressm.adapters.registry import check_known, find_layers, register_adapter, supported_layers
from compressm.adapters.s4d import S4DAdapter
from compressm.adapters.s5 import S5Adapter, S5PytorchAdapter
from compressm.adapters.streaming import stream

register_adapter("compressm.layers.lru.LRU", LRUAdapter())
register_adapter("compressm.layers.s5.S5", S5Adapter())
register_adapter("s5.s5_model.S5SSM", S5PytorchAdapter())
register_adapter("s5.s5_model.S5", S5PytorchAdapter("seq."))
for _name in (
    "compressm.layers.s4d.S4D",
    "models.s4.s4d.S4D",  # state-spaces/s4, as its example imports it; then its older layout, and the file alone
    "src.models.s4.s4d.S4D",
    "s4d.S4D",
):
    register_adapter(_name, S4DAdapter())
for _name in (
    "compressm.layers.mamba.Mamba",
    "mamba_ssm.modules.mamba_simple.Mamba",
    "transformers.models.mamba.modeling_mamba.MambaMixer",
):
    register_adapter(_name, MambaAdapter())
register_adapter("compressm.layers.mamba2.Mamba2", Mamba2Adapter())
for _name in (
    "mamba_ssm.modules.mamba2.Mamba2",
    "mamba_ssm.modules.mamba2_simple.Mamba2Simple",
    *TRANSFORMERS,
):
    register_adapter(_name, Mamba2Adapter(foreign=True))
register_adapter("compressm.layers.gated_delta_net.GatedDeltaNet", GatedDeltaNetAdapter())
for _name in ("fla.layers.gated_deltanet.GatedDeltaNet", *GATED_DELTA_NETS):
    register_adapter(_name, GatedDeltaNetAdapter(foreign=True))
register_adapter("fla.layers.delta_net.DeltaNet", DeltaNetAdapter(foreign=True))
register_adapter("fla.layers.kda.KimiDeltaAttention", KimiDeltaAttentionAdapter(foreign=True))
for _name in KIMI_DELTAS:
    register_adapter(_name, KimiDeltaAdapter())
register_adapter(
    "compressm.layers.linear_attention.LinearAttention",
    LinearAttentionAdapter("katharopoulos2020transformers", "yang2024gated"),
)
for _name, _paper in (
    ("fla.layers.linear_attn.LinearAttention", "katharopoulos2020transformers"),
    ("fla.layers.simple_gla.SimpleGatedLinearAttention", "yang2024gated"),
    ("fla.layers.gla.GatedLinearAttention", "yang2024gated"),
    ("fla.layers.multiscale_retention.MultiScaleRetention", "sun2023retentive"),
):
    register_adapter(_name, LinearAttentionAdapter(_paper, foreign=True))
register_adapter(
    "transformers.models.xlstm.modeling_xlstm.xLSTMLayer",
    LinearAttentionAdapter("beck2024xlstm", foreign=True, distils=False),
)

__all__ = [
    "Adapter",
    "Analysis",
    "DeltaNetAdapter",
    "Distiller",
    "GatedDeltaNetAdapter",
    "KimiDeltaAdapter",
    "KimiDeltaAttentionAdapter",
    "LRUAdapter",
    "LTIAdapter",
    "LayerEdit",
    "LinearAttentionAdapter",
    "Mamba2Adapter",
    "MambaAdapter",
    "Meter",
    "Reduced",
    "S4DAdapter",
    "S5Adapter",
    "S5PytorchAdapter",
    "check_known",
    "find_layers",
    "register_adapter",
    "stream",
    "supported_layers",
]
