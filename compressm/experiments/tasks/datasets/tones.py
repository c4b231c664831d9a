"""Chords in noise: which two tones sound together."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressm.experiments.tasks.datasets.drawn import distinct, refuse_folder
from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.parts import Dataset
from compressm.experiments.tasks.settings import Settings

SEED = 500  # of the chords, beside that of a model
STEP = 20.0  # of the samples' 8 bits for every unit


class TonesSettings(Settings):
    """``chords`` classes of two out of ``frequencies`` each, in noise of standard deviation ``noise``; amplitudes are between
    0.5 and 1.5, phases random.  ``sequences`` of ``length`` steps to train on.
    """

    chords: int = Field(32, ge=2)
    frequencies: int = Field(32, ge=2)
    noise: float = Field(1.0, ge=0)
    sequences: int = Field(16384, ge=1)
    length: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _enough(self) -> TonesSettings:
        if self.chords > (pairs := math.comb(self.frequencies, 2)):
            raise ValueError(f"chords = {self.chords} must be at most {pairs}, the number of pairs of frequencies")
        return self


class Tones(Dataset):
    """Sounds of two tones, 8 bits; every seed has chords of its own."""

    name = "tones"
    Settings = TonesSettings
    settings: TonesSettings
    gives = Sequences
    model = "lru"
    objective = "classification"
    at_hand = True

    def load(self, folder: Path | None) -> Sequences:
        refuse_folder(self.name, folder)
        s = self.settings
        random = torch.Generator().manual_seed(SEED + s.seed)
        pairs = torch.combinations(torch.arange(s.frequencies))
        chords = pairs[distinct(1, len(pairs), s.chords, random)[0]]
        (test_x, test_y), (x, y) = (sounds(count, chords, s, random) for count in (2000, s.sequences))
        return Sequences(f"chords of two of {s.frequencies} tones", x, y, test_x, test_y, s.chords)


def sounds(count: int, chords: Tensor, settings: TonesSettings, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (count, L, 1) uint8 and which of the chords (chords, 2) each of them is."""
    s = settings
    label = torch.randint(len(chords), (count,), generator=random)
    frequency = 0.03 + 0.96 * math.pi * (chords[label] + 0.5) / s.frequencies
    phase = 2 * math.pi * torch.rand(frequency.shape, generator=random)
    amplitude = 0.5 + torch.rand(frequency.shape, generator=random)
    time = torch.arange(s.length)
    heard = s.noise * torch.randn(count, s.length, generator=random)
    for tone in range(2):
        f, p, a = (part[:, tone, None] for part in (frequency, phase, amplitude))
        heard += a * torch.sin(f * time + p)
    return (128 + STEP * heard).round().clamp(0, 255).to(torch.uint8)[:, :, None], label
