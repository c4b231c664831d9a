"""The panel of how spectra and rankings settled."""

from __future__ import annotations

import math

import pytest
import torch
from experiments.report_cases import image_report
from experiments.silent import Silent

from compressm.errors import DataError
from compressm.experiments.methods import METHODS
from compressm.experiments.reports.data import parse_report
from compressm.experiments.reports.html import render
from compressm.experiments.reports.settling import LAYERS, settling
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.task import make_task
from compressm.experiments.training import TrainingRun


def layer(**replaced):
    spectra = [[3.0, 1.0, 0.25], [3.5, 1.5, 0.5], [3.6, 1.6, 0.6]]
    return {
        "steps": [10, 20, 30], "spectra": spectra, "drift": [None, 0.05, 0.01], "bound": [None, 0.2, 0.06],
        "correlation": [0.5, 0.9, 1.0], "overlap": [0.25, 0.75, 1.0], **replaced,
    }  # fmt: skip


def report(**layers):
    data = image_report()
    data["runs"][0]["stability"] = layers
    return data


def test_a_layer_has_three_pictures_and_their_words():
    parsed = parse_report(report(a=layer()))
    pictures = settling(parsed)
    assert [picture.title for picture in pictures] == ["a: spectrum over training", "a: drift", "a: ranking"]
    assert "values number 1, 2" in pictures[0].caption
    assert all("var(--run-compressed, " in picture.svg for picture in pictures)
    page = render(parsed)
    assert "Does the ranking settle early?" in page
    assert page.count("a: drift") == 1


def test_what_was_not_measured_is_not_drawn():
    assert settling(parse_report(image_report())) == []
    assert "settle early" not in render(parse_report(image_report()))
    unknown = layer(bound=[None] * 3, correlation=[None, None, 1.0], overlap=[None, None, 1.0], drift=[None, math.nan, 0.1])
    titles = [picture.title for picture in settling(parse_report(report(a=unknown)))]
    assert titles == ["a: spectrum over training", "a: drift"]
    still = layer(spectra=[[0.0]] * 3, drift=[None, 0.0, 0.0])
    assert [picture.title for picture in settling(parse_report(report(a=still)))] == ["a: ranking"]
    many = report(**{f"l{index}": layer() for index in range(LAYERS + 3)})
    assert len(settling(parse_report(many))) == 3 * LAYERS


def test_incomplete_lists_are_refused():
    with pytest.raises(DataError, match="expected 3 entries in every list"):
        parse_report(report(a=layer(drift=[None, 0.1])))


def test_a_watched_run_is_the_full_one_and_says_what_it_saw(tmp_path):
    sizes = {
        "steps": 10,
        "batch_size": 4,
        "d_state": 9,
        "rank": 4,
        "sequences": 48,
        "length": 20,
        "log_every": 5,
        "eval_every": 10,
    }
    settings = resolve("sysid", {**sizes, "calibration_sequences": 4, "runs": ["full", "watched"], "watch": 0.3})
    full, watched = (
        TrainingRun(METHODS[name], make_task(settings, None, torch.device("cpu")), tmp_path / name)
        for name in ("full", "watched")
    )
    for run in (full, watched):
        assert run.train(Silent(), lambda: False)
    assert watched.record.test == full.record.test
    assert watched.record.reductions == []
    assert full.summary()["stability"] == {}
    (found,) = watched.summary()["stability"].values()
    assert found["steps"] == (3, 6, 9)
    assert found["overlap"][-1] == 1.0
    data = image_report()
    data["runs"].append(watched.summary())
    assert len(settling(parse_report(data))) == 3
