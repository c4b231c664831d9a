"""Shrinking models: how many states, when, measured on what, carried out atomically, and saved."""

from compressm.compression.compressor.compressor import Compressor
from compressm.compression.compressor.oneshot import compress
from compressm.compression.guard.rollback import Rollback
from compressm.compression.planning.budget import Budget, Largest
from compressm.compression.planning.calibration import CalibrationWarning
from compressm.compression.planning.inspection import Inspection, inspect
from compressm.compression.planning.policies import Energy, ErrorBound, FixedRank, LayerPolicy, Policy, Shrink
from compressm.compression.planning.report import GuardReport, LayerReduction, ReductionPlan, ReductionReport
from compressm.compression.planning.schedules import At, Every, Once, Schedule, ScheduleWarning, Warmup, Watch, WhenStable
from compressm.compression.planning.stability import LayerStability, Stability
from compressm.compression.saving.checkpoint import load, save
from compressm.compression.surgery.moments import UnknownStateWarning
from compressm.compression.surgery.optimizer_state import attach_masters, register_optimizer_state
from compressm.compression.surgery.stale import StaleCopyWarning

__all__ = [
    "At",
    "Budget",
    "CalibrationWarning",
    "Compressor",
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
    "Rollback",
    "Schedule",
    "ScheduleWarning",
    "Shrink",
    "Stability",
    "StaleCopyWarning",
    "UnknownStateWarning",
    "Warmup",
    "Watch",
    "WhenStable",
    "attach_masters",
    "compress",
    "inspect",
    "load",
    "register_optimizer_state",
    "save",
]
