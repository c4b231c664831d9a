"""Synthesised words as raw audio: formants, noise and pauses, said at any pitch, speed and loudness."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from compressm.experiments.tasks.datasets.drawn import refuse_folder
from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.parts import Dataset
from compressm.experiments.tasks.settings import Settings

RATE = 8000  # samples of a second
FORMANTS = {  # hertz of the first three, of a male voice (Peterson and Barney 1952), and of two nasals
    "i": (270, 2290, 3010), "a": (730, 1090, 2440), "u": (300, 870, 2240), "e": (530, 1840, 2480), "o": (570, 840, 2410),
    "m": (250, 1100, 2100), "n": (280, 1600, 2600),
}  # fmt: skip
WIDTHS = (60, 90, 150)  # hertz
FRICATIVES = {"s": (3300, 500), "f": (1800, 1600), "h": (900, 900)}  # centre and width of the noise, hertz
BURSTS = {"t": 3000, "p": 700, "k": 1700}  # centre of the noise behind a pause, hertz
WORDS = ("sia", "ais", "tumo", "motu", "ana", "fok", "kof", "pehi", "uni", "satu")
MU = 255.0


class WordsSettings(Settings):
    """``sequences`` words to train on, a quarter as many to test, of ``length`` samples at 8 kHz each, with white noise of
    ``noise`` times the speech's root mean square.
    """

    sequences: int = Field(2000, ge=8)
    length: int = Field(8000, ge=1000)
    noise: float = Field(0.05, ge=0)


class Words(Dataset):
    """Which of ten words was said; some are others said backwards, so that the order of their sounds matters.

    Sounds are 256 levels of mu-law, as telephones have them.  The voice is a source of pulses through resonators (Klatt 1980).
    """

    name = "words"
    Settings = WordsSettings
    settings: WordsSettings
    gives = Sequences
    model = "lru"
    objective = "classification"
    at_hand = True

    def load(self, folder: Path | None) -> Sequences:
        s = self.settings
        refuse_folder(self.name, folder, "synthesised")
        train, test = s.sequences, s.sequences // 4
        labels = np.arange(train + test) % len(WORDS)
        random = np.random.default_rng(s.seed)
        sounds = np.stack([levels(spoken(WORDS[label], s.length, s.noise, random)) for label in labels])
        x, y = torch.from_numpy(sounds)[:, :, None], torch.from_numpy(labels.astype(np.int64))
        return Sequences(f"{len(WORDS)} synthesised words", x[:train], y[:train], x[train:], y[train:], len(WORDS))


def spoken(word: str, length: int, noise: float, random: np.random.Generator) -> np.ndarray:
    """A word (length,), somewhere in the recording, of unit root mean square where it is said."""
    voice = {"pitch": random.uniform(90, 220), "size": random.uniform(0.9, 1.2)}
    total = random.uniform(0.5, 0.85) * length
    shares = random.uniform(0.7, 1.3, len(word)) * np.array([0.5 if sound in BURSTS else 1.0 for sound in word])
    counts = np.maximum(8, np.round(total * shares / shares.sum())).astype(int)
    parts = [sounded(sound, count, random=random, **voice) for sound, count in zip(word, counts, strict=True)]
    speech = np.concatenate(parts)[:length]
    found = noise * random.normal(size=length)
    start = random.integers(0, length - len(speech) + 1)
    found[start : start + len(speech)] += speech / max(float(np.sqrt(np.mean(speech**2))), 1e-9)
    return found * random.uniform(0.5, 1.0)


def sounded(sound: str, count: int, pitch: float, size: float, random: np.random.Generator) -> np.ndarray:
    """One sound of ``count`` samples, which swells and fades.

    Args:
        sound: a key of FORMANTS, FRICATIVES or BURSTS.
        count: samples.
        pitch: of the voice, hertz.
        size: factor of all its formants.
        random: of noise, and of how the pitch moves.
    """
    ramp = min(count // 2, RATE // 100)
    envelope = np.minimum(1.0, np.minimum(np.arange(count), np.arange(count)[::-1]) / max(ramp, 1))
    if sound in FORMANTS:
        glide = pitch * np.linspace(1.0, random.uniform(0.8, 1.2), count)
        phase = np.cumsum(glide) / RATE
        wave = (np.floor(phase[1:]) != np.floor(phase[:-1])).astype(float)  # a pulse a period
        wave = np.concatenate([[1.0], wave])
        for formant, width in zip(FORMANTS[sound], WIDTHS, strict=True):
            wave = resonated(wave, size * formant, width)
        loud = 0.6 if sound in "mn" else 1.0
        return loud * envelope * wave / max(float(np.sqrt(np.mean(wave**2))), 1e-9)
    wave = random.normal(size=count)
    if sound in FRICATIVES:
        wave = resonated(wave, *FRICATIVES[sound])
        return 0.4 * envelope * wave / float(np.sqrt(np.mean(wave**2)))
    wave = resonated(wave, BURSTS[sound], 400)
    behind = np.arange(count) - 0.6 * count  # silence, then a burst that dies away
    return 0.8 * np.where(behind >= 0, np.exp(-np.maximum(behind, 0) / (0.01 * RATE)), 0.0) * wave / float(np.std(wave))


def resonated(wave: np.ndarray, frequency: float, width: float) -> np.ndarray:
    """Behind a resonator of two poles, both in hertz."""
    from scipy.signal import lfilter

    radius = math.exp(-math.pi * width / RATE)
    angle = 2 * math.pi * min(frequency, 0.49 * RATE) / RATE
    return lfilter([1 - radius], [1.0, -2 * radius * math.cos(angle), radius**2], wave)


def levels(sound: np.ndarray) -> np.ndarray:
    """uint8 levels of mu-law, of a sound whose peaks are at four times its root mean square or so."""
    clipped = np.clip(sound / 4, -1, 1)
    companded = np.sign(clipped) * np.log1p(MU * np.abs(clipped)) / math.log1p(MU)
    return np.round((companded + 1) / 2 * MU).astype(np.uint8)
