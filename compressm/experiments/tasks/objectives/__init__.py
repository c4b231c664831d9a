"""What models are trained for, by name."""

from compressm.experiments.registry import Registry
from compressm.experiments.tasks.objectives.answers import Answers
from compressm.experiments.tasks.objectives.classification import Classification
from compressm.experiments.tasks.objectives.next_byte import NextByte
from compressm.experiments.tasks.objectives.regression import Regression
from compressm.experiments.tasks.parts import Objective

OBJECTIVES: Registry[type[Objective]] = Registry("objective", Classification, NextByte, Answers, Regression)
