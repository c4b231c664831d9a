"""One token of the gated delta rule."""

from compressm.kernels.gated_delta_rule_update.op import gated_delta_rule_update
from compressm.kernels.gated_delta_rule_update.record import OPS

__all__ = ["OPS", "gated_delta_rule_update"]
