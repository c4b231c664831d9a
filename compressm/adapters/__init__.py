"""How layer families read as systems, and which of their tensors change together."""

from __future__ import annotations

from compressm.adapters.base import Adapter, LayerEdit
from compressm.adapters.lru import LRUAdapter
from compressm.adapters.registry import find_layers, register_adapter, supported_layers

register_adapter("compressm.layers.lru.LRU", LRUAdapter())

__all__ = ["Adapter", "LRUAdapter", "LayerEdit", "find_layers", "register_adapter", "supported_layers"]
