"""Shrinking models: how many states, when, measured on what, carried out atomically, and saved."""

from compressm.compression.budget import Budget
from compressm.compression.calibration import CalibrationWarning
from compressm.compression.checkpoint import load, save
from compressm.compression.compressor import Compressor
from compressm.compression.inspection import Inspection, inspect
from compressm.compression.moments import UnknownStateWarning
from compressm.compression.oneshot import compress
from compressm.compression.optimizer_state import attach_masters, register_optimizer_state
from compressm.compression.policies import Energy, ErrorBound, FixedRank, LayerPolicy, Policy, Shrink
from compressm.compression.report import GuardReport, LayerReduction, ReductionPlan, ReductionReport
from compressm.compression.rollback import Rollback
from compressm.compression.schedules import At, Every, Once, Schedule, ScheduleWarning, Warmup, WhenStable
from compressm.compression.stale import StaleCopyWarning

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
    "LayerPolicy",
    "LayerReduction",
    "Once",
    "Policy",
    "ReductionPlan",
    "ReductionReport",
    "Rollback",
    "Schedule",
    "ScheduleWarning",
    "Shrink",
    "StaleCopyWarning",
    "UnknownStateWarning",
    "Warmup",
    "WhenStable",
    "attach_masters",
    "compress",
    "inspect",
    "load",
    "register_optimizer_state",
    "save",
]
