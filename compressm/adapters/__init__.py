"""How layer families read as systems, and which of their tensors change together."""

from __future__ import annotations

from compressm.adapters.base import Adapter, Analysis, Distiller, LayerEdit, Meter, Reduced
from compressm.adapters.lru import LRUAdapter
from compressm.adapters.lti import LTIAdapter
from compressm.adapters.mamba import MambaAdapter
from compressm.adapters.mamba2 import TRANSFORMERS, Mamba2Adapter
from compressm.adapters.registry import check_known, find_layers, register_adapter, supported_layers

register_adapter("compressm.layers.lru.LRU", LRUAdapter())
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

__all__ = [
    "Adapter",
    "Analysis",
    "Distiller",
    "LRUAdapter",
    "LTIAdapter",
    "LayerEdit",
    "Mamba2Adapter",
    "MambaAdapter",
    "Meter",
    "Reduced",
    "check_known",
    "find_layers",
    "register_adapter",
    "supported_layers",
]
