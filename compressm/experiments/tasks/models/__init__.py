"""The models that a task can train, by name."""

from compressm.experiments.registry import Registry
from compressm.experiments.tasks.models.gated_delta_net import GatedDeltaNetModel
from compressm.experiments.tasks.models.linear_attention import LinearAttentionModel
from compressm.experiments.tasks.models.lru import Lru
from compressm.experiments.tasks.models.lru_system import LruSystem
from compressm.experiments.tasks.models.mamba import MambaModel
from compressm.experiments.tasks.models.mamba2 import Mamba2Model
from compressm.experiments.tasks.parts import Model

MODELS: Registry[type[Model]] = Registry(
    "model", Lru, MambaModel, Mamba2Model, GatedDeltaNetModel, LinearAttentionModel, LruSystem
)  # fmt: skip
