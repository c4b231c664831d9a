"""Simulated plants of robotics: what a system identification task identifies, its states counted by physics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressm.control import StateSpace, sampled
from compressm.errors import DataError
from compressm.experiments.tasks.datasets.drawn import refuse_folder
from compressm.experiments.tasks.datasets.signals import SEED, Signals, white_pairs
from compressm.experiments.tasks.parts import Dataset
from compressm.experiments.tasks.settings import Settings

SUBSTEPS = 2  # of Runge and Kutta's fourth-order rule, between two samples of the arm
GRAVITY = 9.81


class PlantSettings(Settings):
    """``plant``: ``"springs"``, a row of ``channels`` masses between springs and dampers with a force on each and the position
    of each measured, 2 ``channels`` states; or ``"arm"``, two links that hang with a torque at each of 2 joints and both angles
    measured, 4 states, nearly linear as the torques are small.  Masses, lengths, stiffness and friction differ from seed to
    seed.  Inputs are white, held for a ``sampling`` of seconds, measurements have noise of standard deviation ``noise`` where
    the signal has one; ``sequences`` pairs of ``length`` steps to train on.
    """

    plant: Literal["springs", "arm"] = "springs"
    channels: int = Field(4, ge=1)
    sampling: float = Field(0.3, gt=0)
    noise: float = Field(0.05, ge=0)
    sequences: int = Field(4096, ge=1)
    length: int = Field(256, ge=1)


class Plant(Dataset):
    """Which forces move a mechanism how; every seed has a plant of its own."""

    name = "plant"
    Settings = PlantSettings
    settings: PlantSettings
    gives = Signals
    model = "lru_system"
    objective = "regression"
    at_hand = True

    def load(self, folder: Path | None) -> Signals:
        s = self.settings
        refuse_folder(self.name, folder, "simulated")
        if s.plant == "arm" and s.channels != 2:
            raise DataError(f"channels = {s.channels}: an arm of two links has 2. Set channels=2")
        random = torch.Generator().manual_seed(SEED + s.seed)
        simulate = springs(s, random) if s.plant == "springs" else arm(s, random)
        name = f"{s.channels} masses between springs" if s.plant == "springs" else "an arm of two links"
        name = f"{name}, order {2 * s.channels}"
        return white_pairs(name, simulate, random, s.sequences, s.length, s.channels, s.noise, alike=True)


def springs(settings: PlantSettings, random: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Inputs (n, L, masses) to positions at the end of every step, of a row of masses that is fixed at both ends."""
    model = sampled(*chain(settings.channels, random), step=settings.sampling, method="zoh")
    return functools.partial(simulated, model)


def chain(masses: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C, float64, of a row of masses between springs and dampers in continuous time."""

    def drawn(count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=random, dtype=torch.float64)

    mass, ends = drawn(masses, 0.5, 1.5), torch.eye(masses + 1, masses, dtype=torch.float64)
    stretch = ends - torch.roll(ends, 1, 0)  # of the masses + 1 springs, by the positions
    constants = drawn(masses + 1, 1, 3), drawn(masses + 1, 0.1, 0.3)
    stiffness, damping = (stretch.T @ (constant[:, None] * stretch) for constant in constants)
    zero, eye = torch.zeros(masses, masses, dtype=torch.float64), torch.eye(masses, dtype=torch.float64)
    A = torch.cat([torch.cat([zero, eye], 1), torch.cat([-stiffness / mass[:, None], -damping / mass[:, None]], 1)])
    return A, torch.cat([zero, eye / mass[:, None]]), torch.cat([eye, zero], 1)


def simulated(model: StateSpace, x: Tensor) -> Tensor:
    """C times the states behind every step, float32."""
    A, B, C, _ = model
    state, found = x.new_zeros(len(x), len(A), dtype=torch.float64), []
    for now in x.double().unbind(1):
        state = state @ A.T + now @ B.T
        found.append(state @ C.T)
    return torch.stack(found, 1).float()


def arm(settings: PlantSettings, random: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Inputs (n, L, 2) times a small torque to both joints' angles, of two hanging links with their masses at the ends."""
    m1, m2 = (0.5 + torch.rand(2, generator=random)).tolist()
    l1, l2 = (0.5 + 0.5 * torch.rand(2, generator=random)).tolist()
    friction = 0.2 + 0.3 * torch.rand(2, generator=random)
    torque, coupling, d = 0.05 * GRAVITY * m2 * l2, m2 * l1 * l2, m2 * l2**2

    def slope(state: Tensor, u: Tensor) -> Tensor:
        """Of angles and velocities (n, 4) under torques (n, 2): M(q) dv = u - friction v - Coriolis - weight."""
        v1, v2, cos, sin = state[:, 2], state[:, 3], state[:, 1].cos(), state[:, 1].sin()
        a, b = (m1 + m2) * l1**2 + d + 2 * coupling * cos, d + coupling * cos
        lower = m2 * GRAVITY * l2 * (state[:, 0] + state[:, 1]).sin()
        upper = lower + (m1 + m2) * GRAVITY * l1 * state[:, 0].sin()
        f1, f2 = (u - friction * state[:, 2:]).unbind(1)
        f1, f2 = f1 + coupling * sin * (2 * v1 + v2) * v2 - upper, f2 - coupling * sin * v1**2 - lower
        det = a * d - b * b
        return torch.stack([v1, v2, (d * f1 - b * f2) / det, (a * f2 - b * f1) / det], 1)

    def simulate(x: Tensor) -> Tensor:
        state, found = x.new_zeros(len(x), 4), []
        for now in (torque * x).unbind(1):
            for _ in range(SUBSTEPS):
                state = runge_kutta(functools.partial(slope, u=now), state, settings.sampling / SUBSTEPS)
            found.append(state[:, :2])
        return torch.stack(found, 1)

    return simulate


def runge_kutta(slope: Callable[[Tensor], Tensor], state: Tensor, step: float) -> Tensor:
    """The state a step later, by the classical rule of fourth order."""
    k1 = slope(state)
    k2 = slope(state + step / 2 * k1)
    k3 = slope(state + step / 2 * k2)
    k4 = slope(state + step * k3)
    return state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
