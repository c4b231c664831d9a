"""Tasks that are drawn: every sequence says the truth about itself, and draws follow from seeds alone."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from compressm.errors import ConfigError, DataError
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.datasets import DATASETS, listops
from compressm.experiments.tasks.datasets.drawn import NOT_ASKED
from compressm.experiments.tasks.datasets.listops import Lists
from compressm.experiments.tasks.datasets.mnist import pooled
from compressm.experiments.tasks.datasets.selective_copy import Copies

CPU = torch.device("cpu")
COPIES, LISTS = Copies("x", 19, CPU, 4, 3), Lists("x", 30, CPU, 6, 3, 4)


def solved(tokens):
    """The value of a nested list that is written in tokens, by a stack."""
    stack = [[]]
    for token in tokens:
        if token == listops.CLOSE:
            operator, *values = stack.pop()
            name = listops.OPERATORS[operator - listops.FIRST_OPERATOR]
            answers = {"MIN": min, "MAX": max, "MED": lambda v: math.floor(statistics.median(v)), "SM": lambda v: sum(v) % 10}
            assert 2 <= len(values) <= LISTS.entries
            stack[-1].append(answers[name](values))
        elif token >= listops.FIRST_OPERATOR:
            assert len(stack) <= LISTS.depth
            stack.append([token])
        else:
            stack[-1].append(token - 1)
    ((value,),) = stack
    return value


def test_lists_have_the_value_that_is_the_answer():
    tokens, answers = LISTS.draw(300, 5)
    assert tokens.shape == answers.shape == (300, 30)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        written = [token for token in row if token]
        assert row == [0] * (30 - len(written)) + written
        assert 6 <= len(written) <= 30
        assert answer == [NOT_ASKED] * 29 + [1 + solved(written)]
    assert set(tokens.unique().tolist()) == set(range(LISTS.vocabulary))
    operators = tokens[(tokens >= listops.FIRST_OPERATOR) & (tokens < listops.CLOSE)].bincount()[listops.FIRST_OPERATOR :]
    assert (operators / operators.sum() - 1 / 4).abs().max() < 0.05


def test_values_are_copied_in_their_order():
    tokens, answers = COPIES.draw(500, 3)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        assert row[-4:] == [1] * 4
        values = [token for token in row[:-4] if token]
        assert len(values) == 4
        assert all(2 <= value < COPIES.vocabulary for value in values)
        assert answer == [NOT_ASKED] * 15 + values
    assert ((tokens[:, :15] > 0).double().mean(0) - 4 / 15).abs().max() < 0.08


@pytest.mark.parametrize("data", [COPIES, LISTS], ids=["copies", "lists"])
def test_draws_follow_from_the_seed(data):
    first, again, other, held_out = (d.draw(20, seed)[0] for d, seed in ((data, 1), (data, 1), (data, 2), (data.held_out(), 1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, held_out)
    assert int((first[:, None] == held_out).all(-1).sum()) < 5


def test_chords_are_the_two_loudest_tones():
    settings = resolve("tones", {"chords": 5, "frequencies": 8, "noise": 0.0, "sequences": 40, "length": 256})
    data = DATASETS["tones"](settings).load(None)
    assert data.train_x.shape == (40, 256, 1)
    assert data.train_x.dtype == torch.uint8
    signal = (data.train_x[:, :, 0].double() - 128) * torch.hann_window(256).double()
    frequencies = 0.03 + 0.96 * math.pi * (torch.arange(8) + 0.5) / 8
    wave = torch.exp(-1j * frequencies[:, None].double() * torch.arange(256))
    loudest = (signal.to(wave.dtype) @ wave.T).abs().topk(2).indices.sort(1).values
    chord = {}
    for label, pair in zip(data.train_y.tolist(), loudest.tolist(), strict=True):
        assert chord.setdefault(label, pair) == pair
    assert len({tuple(pair) for pair in chord.values()}) == len(chord) == 5
    other = DATASETS["tones"](resolve("tones", {**settings.model_dump(include={"chords", "sequences"}), "seed": 1})).load(None)
    assert not torch.equal(other.train_x[:5], data.train_x[:5])


def test_pooled_pixels_are_means_of_squares():
    image = torch.arange(16, dtype=torch.uint8).view(1, 16, 1)
    assert pooled(image).flatten().tolist() == [2, 4, 10, 12]  # of 2.5, 4.5, 10.5 and 12.5, halves to even
    assert pooled(torch.full((2, 784, 1), 255, dtype=torch.uint8)).shape == (2, 196, 1)
    bright = torch.full((1, 4, 1), 255, dtype=torch.uint8)
    assert pooled(bright).tolist() == [[[255]]]


def test_what_cannot_be_drawn_is_refused(tmp_path):
    for preset, overrides, words in (
        ("listops", {"shortest": 41}, "shortest = 41 must be at most 40"),
        ("listops", {"depth": 1, "entries": 3}, "shortest = 10 must be at most 5"),
        ("selective-copy", {"copied": 33}, "length = 48 must be at least 2 [*] copied = 66"),
        ("tones", {"frequencies": 8}, "chords = 32 must be at most 28"),
        ("tones", {"rank": 128}, "rank = 128 must be below d_state = 128"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(preset, overrides)
    for preset in ("listops", "selective-copy", "tones"):
        settings = resolve(preset, {})
        with pytest.raises(DataError, match=f"expected no folder, as '{settings.dataset}' is drawn at random"):
            DATASETS[settings.dataset](settings).load(tmp_path)
