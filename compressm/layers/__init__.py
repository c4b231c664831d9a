"""Drop-in state-space layers, plain ``nn.Module``s."""

from compressm.layers.lru import LRU

__all__ = ["LRU"]
