"""What would happen: measuring, spectra, policies, schedules, plans and reports.  Changes nothing."""

from compressm.compression.planning.budget import Budget, Largest
from compressm.compression.planning.calibration import CalibrationWarning
from compressm.compression.planning.inspection import Inspection, inspect
from compressm.compression.planning.policies import Energy, ErrorBound, FixedRank, LayerPolicy, Policy, Shrink
from compressm.compression.planning.report import GuardReport, LayerReduction, ReductionPlan, ReductionReport
from compressm.compression.planning.schedules import At, Every, Once, Schedule, ScheduleWarning, Warmup, WhenStable

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
    "Once",
    "Policy",
    "ReductionPlan",
    "ReductionReport",
    "Schedule",
    "ScheduleWarning",
    "Shrink",
    "Warmup",
    "WhenStable",
    "inspect",
]
