"""Synthesised words: their sounds are where their formants are, and nothing gives the class away but them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressm.errors import ConfigError, DataError
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.datasets import DATASETS
from compressm.experiments.tasks.datasets.words import BURSTS, FORMANTS, FRICATIVES, RATE, WORDS, levels, sounded, spoken


def spectrum(sound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.fft.rfftfreq(len(sound), 1 / RATE), np.abs(np.fft.rfft(sound)) ** 2


@pytest.mark.parametrize("vowel", ["i", "a", "u", "e", "o"])
def test_vowels_are_loud_at_their_first_formant(vowel):
    frequency, power = spectrum(sounded(vowel, 4000, pitch=100, size=1.0, random=np.random.default_rng(0)))
    first, second, _ = FORMANTS[vowel]
    near, valley = (power[abs(frequency - centre) < 60].sum() for centre in (first, (first + second) / 2))
    assert near > 2 * valley
    assert abs(frequency[power.argmax()] - first) < 200


@pytest.mark.parametrize("sound", FRICATIVES)
def test_fricatives_are_noise_around_their_centre(sound):
    frequency, power = spectrum(sounded(sound, 4000, pitch=100, size=1.0, random=np.random.default_rng(0)))
    assert abs((frequency * power).sum() / power.sum() - FRICATIVES[sound][0]) < 700


@pytest.mark.parametrize("sound", BURSTS)
def test_plosives_are_a_pause_and_a_burst(sound):
    wave = sounded(sound, 800, pitch=100, size=1.0, random=np.random.default_rng(0))
    assert not wave[:470].any()
    assert np.abs(wave[485:560]).max() > 3 * np.abs(wave[700:]).max()


def test_every_word_is_somewhere_in_its_recording_and_never_twice_the_same():
    random = np.random.default_rng(0)
    for word in WORDS:
        one, other = (spoken(word, 3000, 0.0, random) for _ in range(2))
        assert one.shape == (3000,)
        assert 0.3 < np.mean(one != 0) < 0.9
        assert not np.allclose(one, other)
    quiet = levels(np.array([-9.0, -0.01, 0.0, 0.01, 9.0]))
    assert quiet.tolist() == [0, 116, 128, 139, 255]


def test_the_data():
    data = DATASETS["words"](resolve("words", {"sequences": 40, "length": 1000})).load(None)
    assert data.describe() | {"name": ""} == {"name": "", "train": 40, "test": 10, "length": 1000, "channels": 1, "classes": 10}
    assert data.train_x.dtype == torch.uint8
    assert torch.bincount(data.train_y).tolist() == [4] * 10
    again = DATASETS["words"](resolve("words", {"sequences": 40, "length": 1000, "seed": 1})).load(None)
    assert not torch.equal(data.train_x, again.train_x)


def test_wrong_settings(tmp_path):
    with pytest.raises(DataError, match="expected no folder, as 'words' is synthesised"):
        DATASETS["words"](resolve("words", {})).load(tmp_path)
    with pytest.raises(ConfigError, match="length"):
        resolve("words", {"length": 10})
