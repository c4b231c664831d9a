"""Reports on a metric of which less is better."""

from __future__ import annotations

import math

import pytest
from experiments.report_cases import image_report, page_of, printed, text_report

from compressm.errors import DataError
from compressm.experiments.reports import plots
from compressm.experiments.reports.comparison import rows
from compressm.experiments.reports.data import parse_report
from compressm.experiments.reports.html import render
from compressm.experiments.reports.summary import headline, paired_gaps, sampling_noise
from compressm.experiments.tasks.metrics import ACCURACY, BITS_PER_BYTE


@pytest.fixture
def data():
    return text_report()


def test_rows_hold_the_metric_and_its_gap(data):
    compressed, full, small = rows(parse_report(data))
    assert (compressed.score, full.score, small.score) == (1.931, 1.92, 2.05)
    assert compressed.gap == pytest.approx(0.011)
    assert full.gap is None
    assert small.gap == pytest.approx(0.13)
    assert sampling_noise(parse_report(data)) is None


def test_headline_says_better_for_less_and_worse_for_more(data):
    assert headline(data).startswith(
        "While it trained, the model shrank from 128 to 28 states in 2 layers: 1.931 bits per byte on the test set, 0.011 "
        "worse than the full-size run and 0.119 better than the run that was small from the start. A training step takes"
    )
    data["runs"][0]["final"]["bits_per_byte"] = 1.9199
    assert "1.920 bits per byte on the test set, equal to the full-size run and 0.130 better than" in headline(data)
    data["runs"][0]["final"]["bits_per_byte"] = 2.06
    assert "0.140 worse than the full-size run and 0.010 worse than the run that was small from the start" in headline(data)


def test_table_names_the_direction(data):
    for width in (80, 100):
        text = printed(data, width)
        assert max(map(len, text.splitlines())) <= width
        for expected in ("bits/byte", "1.931", "+0.011", "+0.130", "2 x 14", "less is better"):
            assert expected in text
        assert "test %" not in text
        assert "points" not in text


def test_page_holds_bits_nats_and_perplexity(data, tmp_path):
    page = page_of(data, tmp_path)
    for expected in (
        "Test bits per byte", "0.011 worse than full size", "+0.011", "validation bits per byte 2.612 → 2.622",
        "less is better", "on the same 40 test windows: Compressed differs by +0.011 ± 0.00",
        "nats per byte, and perplexity per byte: Compressed 1.338, 3.81; Full 1.331, 3.78",
        "Measured on the validation set", "selective spectrum (N values per layer), data Gramians", "64 → 14 values",
        "Validation bits per byte by step",
    ):  # fmt: skip
        assert expected in page.text, expected
    for absent in ("accuracy", "Accuracy", "tau =", "balanced"):
        assert absent not in page.text, absent
    assert "A note." in page.text
    assert page.tags.count("svg") == len(plots.PICTURES) + 2


def test_pictures_hold_the_change_at_the_cut(data):
    report = parse_report(data)
    assert report.around(report.runs[0].reductions[0]) == (2.6123, 2.6218)
    assert "less is better" in plots.score(report).svg
    for entry in data["runs"]:
        entry["evaluations"] = []
    words = render(parse_report(data))
    assert "No validation bits per byte by time: the report holds no evaluations" in words


def test_gaps_have_the_spread_of_paired_windows(data):
    values = [[1.0, 2.0, 3.0, 4.0], [0.9, 2.0, 2.8, 3.9], []]
    for entry, windows in zip(data["runs"], values, strict=True):
        entry["final"]["window_bits"] = windows
    half = 1.96 * math.sqrt((0.0 + 0.01 + 0.01 + 0.0) / 3) / 2  # gaps 0.1, 0, 0.2, 0.1
    assert paired_gaps(parse_report(data)) == [f"+0.100 ± {half:.3f} from the full-size run"]
    assert paired_gaps(parse_report(image_report())) == []


def test_unknown_metric_is_an_error(data):
    data["metric"] = "beauty"
    with pytest.raises(DataError, match="metric 'beauty' is unknown, expected one of accuracy, bits_per_byte"):
        parse_report(data)


def test_numbers_of_both_metrics():
    assert [ACCURACY.text(v) for v in (None, 0.9724)] == ["-", "97.24 %"]
    assert [BITS_PER_BYTE.text(v) for v in (None, 1.9234)] == ["-", "1.923"]
    assert (ACCURACY.signed(-0.0031), BITS_PER_BYTE.signed(0.0209)) == ("-0.31", "+0.021")
    assert (ACCURACY.live(0.5, 1), BITS_PER_BYTE.live(2.5)) == ("50.0%", "2.500")
    assert ACCURACY.compared(-0.0031, "x") == "0.31 points below x"
    assert BITS_PER_BYTE.compared(-0.02, "x") == "0.020 better than x"
    assert BITS_PER_BYTE.compared(1e-5, "x") == "equal to x"
