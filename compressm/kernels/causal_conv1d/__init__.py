"""The short causal convolution in front of a scan."""

from compressm.kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_update
from compressm.kernels.causal_conv1d.record import OPS

__all__ = ["OPS", "causal_conv1d", "causal_conv1d_update"]
