"""Drop-in state-space layers and norms, plain ``nn.Module``s."""

from compressm.layers.linear_attention import LinearAttention
from compressm.layers.lru import LRU
from compressm.layers.lru_block import LRUBlock
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.norms import LayerNorm, RMSNorm

__all__ = ["LRU", "LRUBlock", "LayerNorm", "LinearAttention", "Mamba", "Mamba2", "RMSNorm"]
