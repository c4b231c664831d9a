"""The report's pictures by themselves."""

from __future__ import annotations

import math

import pytest

from compressm.experiments.reports import drawing, plots
from compressm.experiments.reports.data import parse_report


def test_runs_have_one_colour_everywhere(data):
    report = parse_report(data)
    for make in plots.PICTURES.values():
        svg = make(report).svg
        for name in ("compressed", "full", "small", "small-narrow"):
            assert f"var(--run-{name}, " in svg
    assert len({drawing.look(r.name).colour for r in report.runs} | {drawing.look("other").colour}) == 5


@pytest.mark.parametrize("spectrum", [[], [0.0] * 128, [math.nan] * 128, [1.0] * 128, [1.0] + [0.0] * 127])
def test_odd_spectra_are_drawn(data, spectrum):
    for entry in data["runs"][0]["reductions"][0]["layers"]:
        entry |= {"spectrum": spectrum, "spectrum_after": spectrum[:28], "gramians": "data-free"}
    pictures = plots.spectra(parse_report(data))
    assert len(pictures) == 2 * bool(spectrum)
    assert all(picture.svg.startswith("<svg") for picture in pictures)


def test_thin_keeps_ends_and_gaps():
    points = [(step, None if step > 5000 else 2.0) for step in range(1, 10_001)]
    thinned = drawing.thin(points, 10.0)
    assert len(thinned) <= drawing.MAX_POINTS
    assert thinned[0][1] == 20.0
    assert thinned[-1] == (10_000, None)
    assert drawing.smooth([(1, 1.0), (2, None), (3, 3.0)], 3) == [(1, 1.0), (2, None), (3, 3.0)]
    assert drawing.thin([]) == []
