"""Drop-in state-space layers, plain ``nn.Module``s."""

from compressm.layers.lru import LRU
from compressm.layers.mamba import Mamba

__all__ = ["LRU", "Mamba"]
