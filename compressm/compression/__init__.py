"""Shrinking models: how many states, when, measured on what, carried out atomically, and saved."""

from compressm.compression.checkpoint import load, save
from compressm.compression.compressor import Compressor
from compressm.compression.guard import Rollback
from compressm.compression.inspection import Inspection, inspect
from compressm.compression.moments import UnknownStateWarning
from compressm.compression.oneshot import compress
from compressm.compression.policies import Energy, FixedRank, Policy, Shrink
from compressm.compression.report import GuardReport, LayerReduction, ReductionPlan, ReductionReport
from compressm.compression.schedules import At, Every, Once, Schedule, ScheduleWarning, Warmup, WhenStable

__all__ = [
    "At",
    "Compressor",
    "Energy",
    "Every",
    "FixedRank",
    "GuardReport",
    "Inspection",
    "LayerReduction",
    "Once",
    "Policy",
    "ReductionPlan",
    "ReductionReport",
    "Rollback",
    "Schedule",
    "ScheduleWarning",
    "Shrink",
    "UnknownStateWarning",
    "Warmup",
    "WhenStable",
    "compress",
    "inspect",
    "load",
    "save",
]
