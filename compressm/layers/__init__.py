"""Drop-in state-space layers and norms, plain ``nn.Module``s."""

from compressm.layers.gated_delta_net import GatedDeltaNet
from compressm.layers.linear_attention import LinearAttention
from compressm.layers.lru import LRU
from compressm.layers.lru_block import LRUBlock
from compressm.layers.mamba import Mamba
from compressm.layers.mamba2 import Mamba2
from compressm.layers.norms import LayerNorm, RMSNorm
from compressm.layers.s4d import S4D
from compressm.layers.s5 import S5

__all__ = [
    "LRU",
    "S4D",
    "S5",
    "GatedDeltaNet",
    "LRUBlock",
    "LayerNorm",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "RMSNorm",
]
