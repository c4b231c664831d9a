"""What would happen: measuring, spectra, policies, schedules, plans and reports.  Changes nothing."""

from compressm.compression.planning.budget import Budget, Largest
from compressm.compression.planning.calibration import CalibrationWarning
from compressm.compression.planning.inspection import Inspection, inspect
from compressm.compression.planning.policies import Energy, ErrorBound, FixedRank, LayerPolicy, Policy, Shrink
from compressm.compression.planning.report import GuardReport, LayerReduction, ReductionPlan, ReductionReport
from compressm.compression.planning.schedules import At, Every, Once, Schedule, ScheduleWarning, Warmup, Watch, WhenStable
from compressm.compression.planning.stability import LayerStability, Stability

__all__ = [
    "At",
    "Budget",
    "CalibrationWarning",
    "Energy",
    "ErrorBound",
    "Every",
    "FixedRank",
    "GuardReport",
    "Inspection",
    "Largest",
    "LayerPolicy",
    "LayerReduction",
    "LayerStability",
    "Once",
    "Policy",
    "ReductionPlan",
    "ReductionReport",
    "Schedule",
    "ScheduleWarning",
    "Shrink",
    "Stability",
    "Warmup",
    "Watch",
    "WhenStable",
    "inspect",
]
