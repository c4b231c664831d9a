"""The datasets that a task can be made of, by name."""

from compressm.experiments.registry import Registry
from compressm.experiments.tasks.datasets.cifar import SequentialCifar
from compressm.experiments.tasks.datasets.digits import Digits
from compressm.experiments.tasks.datasets.listops import ListOps
from compressm.experiments.tasks.datasets.mnist import PooledMnist, SequentialMnist
from compressm.experiments.tasks.datasets.plants import Plant
from compressm.experiments.tasks.datasets.recall import Recall
from compressm.experiments.tasks.datasets.selective_copy import SelectiveCopy
from compressm.experiments.tasks.datasets.signals import SystemIdentification
from compressm.experiments.tasks.datasets.texts import StandardLibrary
from compressm.experiments.tasks.datasets.tones import Tones
from compressm.experiments.tasks.datasets.words import Words
from compressm.experiments.tasks.parts import Dataset

DATASETS: Registry[type[Dataset]] = Registry(
    "dataset", Digits, SequentialMnist, PooledMnist, SequentialCifar, StandardLibrary, Recall, SelectiveCopy, ListOps, Tones,
    SystemIdentification, Plant, Words,
)  # fmt: skip
