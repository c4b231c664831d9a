"""The scan of a linear time-invariant system, with its projections."""

from compressm.kernels.lti_scan.op import lti_scan, lti_scan_planar
from compressm.kernels.lti_scan.record import OPS

__all__ = ["OPS", "lti_scan", "lti_scan_planar"]
