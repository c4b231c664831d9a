"""The Compressor and ``compress``: a plan carried out, in mid-training or after it."""

from compressm.compression.compressor.compressor import Compressor
from compressm.compression.compressor.oneshot import compress

__all__ = ["Compressor", "compress"]
