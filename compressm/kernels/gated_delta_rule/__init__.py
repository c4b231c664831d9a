"""The gated delta rule."""

from compressm.kernels.gated_delta_rule.op import gated_delta_rule
from compressm.kernels.gated_delta_rule.record import OPS

__all__ = ["OPS", "gated_delta_rule"]
