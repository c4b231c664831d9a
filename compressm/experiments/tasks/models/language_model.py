"""A model of tokens: embedding, blocks of a token mixer, projection to scores."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import compressm
from compressm.control import RowCriterion
from compressm.experiments.tasks.datasets.texts import BYTES
from compressm.experiments.tasks.datasets.tokens import Tokens
from compressm.experiments.tasks.parts import BlockModel, Cut, Model
from compressm.experiments.tasks.settings import BlockSettings, SettingsClass
from compressm.kernels import KernelPlan
from compressm.layers import RMSNorm


class TokenSettings(BlockSettings):
    """``rank`` is the number of states that a reduction leaves in every layer, ``expand`` the inner channels of a mixer per
    channel of the model; ``tied`` models have the embedding, transposed, as their last projection.
    """

    rank: int = Field(12, ge=1)
    expand: int = Field(2, ge=1)
    tied: bool = True


class MatrixSettings(TokenSettings):
    """``form`` is what reductions make of the layers, as the Compressor takes it; with ``d_features`` these have maps from so
    many channels of keys and queries to their states from the start.
    """

    form: Literal["auto", "strict", "projected"] = "auto"
    d_features: int | None = Field(None, ge=1)


class Block(nn.Module):
    """x + mixer(RMSNorm(x)), the residual block of mamba_ssm's language models.

    Args:
        d_model: channels H.
        mixer: the attribute that holds the layer.
        layer: (batch, L, H) -> (batch, L, H).
    """

    def __init__(self, d_model: int, mixer: str, layer: nn.Module) -> None:
        super().__init__()
        self._mixer = mixer
        self.norm = RMSNorm(d_model, eps=1e-5)
        self.add_module(mixer, layer)

    @property
    def layer(self) -> nn.Module:
        """The mixer."""
        return getattr(self, self._mixer)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, L, H) -> (batch, L, H)."""
        return x + self.layer(self.norm(x))


class LanguageModel(BlockModel):
    """Scores of the next token.

    Initialised as in mamba_ssm: embedding of standard deviation 0.02, projections out of the blocks divided by the square
    root of the number of residual layers.

    Args:
        d_model: H.
        d_states: states of every block.
        mixer: the attribute of a block that holds its layer.
        layer: makes a layer of that many states; its projection out is ``out_proj`` or ``o_proj``.
        vocabulary: number of different tokens.
        tied: whether the last projection is the embedding, transposed.
    """

    def __init__(
        self,
        d_model: int,
        d_states: Sequence[int],
        mixer: str,
        layer: Callable[[int], nn.Module],
        *,
        vocabulary: int = BYTES,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.blocks = nn.ModuleList(Block(d_model, mixer, layer(n)) for n in d_states)
        self.norm = RMSNorm(d_model, eps=1e-5)
        self.head = None if tied else nn.Linear(d_model, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        with torch.no_grad():
            for block in self.blocks:
                made = getattr(block, mixer)
                (made.out_proj if hasattr(made, "out_proj") else made.o_proj).weight /= math.sqrt(len(self.blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, L), any integer dtype -> scores (batch, L, vocabulary) of what is behind each."""
        x = self.embedding(tokens.long())
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return nn.functional.linear(x, self.embedding.weight) if self.head is None else self.head(x)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """AdamW groups: matrices decay; norms, biases, embeddings and what a layer exempts, such as A_log, do not (mamba_ssm's and
    GPT's practice).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for parameter in model.parameters():
        exempt = parameter.dim() < 2 or id(parameter) in embeddings or getattr(parameter, "_no_weight_decay", False)
        (kept if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": kept, "lr": lr, "weight_decay": 0.0},
    ]


class TokenModel(Model):
    """Language models of one token mixer.  A mixer adds ``name`` and its layer, or ``kernel_plan`` as well where that has no
    ``plan_for``.

    A mixer with a projected form declares ``d_features``, None or the features in front of its states, among its settings.

    Attributes:
        divisor: the setting that has to divide the ``expand * d_model`` inner channels; None: there is none.
    """

    Settings: ClassVar[SettingsClass] = TokenSettings
    settings: TokenSettings
    reads = Tokens
    criteria = RowCriterion
    divisor: ClassVar[str | None] = None

    @abstractmethod
    def layer(self, states: int) -> nn.Module:
        """The mixer of a block with that many states, with random initial parameters."""

    def small_states(self) -> list[int]:
        return [self.settings.rank] * self.settings.blocks

    def build(self, data: Tokens, states: Sequence[int]) -> LanguageModel:
        return self._model(states, data.vocabulary)

    def blank(self, facts: Mapping[str, Any]) -> LanguageModel:
        return self._model(self.full_states(), facts.get("vocabulary", BYTES))

    def _model(self, states: Sequence[int], vocabulary: int) -> LanguageModel:
        s = self.settings
        return LanguageModel(s.d_model, states, self.mixer, self.layer, vocabulary=vocabulary, tied=s.tied)

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        return parameter_groups(model, self.settings.lr, self.settings.weight_decay)

    @property
    def cut(self) -> Cut:
        s = self.settings
        return Cut(compressm.FixedRank(s.rank), form=s.form if isinstance(s, MatrixSettings) else "auto")

    def kernel_plan(self, length: int, device: torch.device) -> KernelPlan:
        with torch.device("meta"):
            layer: Any = self.layer(self.settings.d_state)
        return layer.plan_for(device.type, torch.float32, self.settings.batch_size, length)

    def check(self, *, reduced: bool) -> None:
        s = self.settings
        if reduced and s.rank >= s.d_state:
            raise ValueError(f"rank = {s.rank} must be below d_state = {s.d_state}")
        if isinstance(s, MatrixSettings) and s.d_features is not None:
            if s.d_features < s.d_state:
                raise ValueError(f"d_features = {s.d_features} must be at least d_state = {s.d_state}, or left out")
            if s.form == "strict":
                raise ValueError(f"form = 'strict' does not go with d_features = {s.d_features}: such layers have maps")
        if self.divisor is not None and (inner := s.expand * s.d_model) % (parts := getattr(s, self.divisor)):
            raise ValueError(f"{self.divisor} = {parts} must divide expand * d_model = {inner}")
