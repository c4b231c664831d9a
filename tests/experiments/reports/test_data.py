"""report.json as records, and the numbers that are derived from it."""

from __future__ import annotations

import json
import math

import pytest
from experiments.report_cases import SPECTRUM, layer

from compressm.errors import DataError
from compressm.experiments.reports.comparison import rows
from compressm.experiments.reports.data import LayerCut, parse_report, read_report
from compressm.experiments.reports.summary import duration, milliseconds, sampling_noise, significant, states


def test_rows_compare_with_the_full_run(data):
    compressed, full, small, _ = rows(parse_report(data))
    assert compressed.speed == pytest.approx(0.0126 / 0.0070)
    assert compressed.gap == pytest.approx(-0.0032)
    assert compressed.step_seconds == 0.0070
    assert compressed.interleaved
    assert compressed.step_spread == pytest.approx((0.0063, 0.0077))
    assert (compressed.states, compressed.seconds_training, compressed.seconds_total) == ((14, 14), 10.0, 12.0)
    assert (full.speed, full.gap) == (1.0, None)
    assert small.gap == pytest.approx(-0.0232)


def test_speed_compares_times_measured_the_same_way(data):
    data["timing"]["steps"] = [step for step in data["timing"]["steps"] if step["name"] != "compressed"]
    compressed, _, small, _ = rows(parse_report(data))
    assert compressed.step_seconds == 0.008
    assert not compressed.interleaved
    assert compressed.speed == pytest.approx(0.012 / 0.008)
    assert small.speed == pytest.approx(1.8)
    data["timing"] = None
    assert [row.speed for row in rows(parse_report(data))] == pytest.approx([1.5, 1.0, 12 / 7.1, 12 / 7.1])


@pytest.mark.parametrize("convention", ["real", "complex"])
@pytest.mark.parametrize("gramians", ["data", "data-free"])
def test_kept_values(convention, gramians):
    made = layer("a", gramians=gramians, convention=convention)
    cut = LayerCut.model_validate({**vars(made), "spectrum_after": list(made.spectrum_after)})
    assert cut.kept_values == (28 if convention == "real" else 14)
    assert ("2N" in cut.spectrum_name) == (convention == "real")
    assert gramians in cut.spectrum_name
    tail = sum(SPECTRUM[25:]) / sum(SPECTRUM)  # three real modes take a state each
    assert LayerCut(name="a", rank_before=64, rank_after=14, spectrum=list(SPECTRUM), discarded=tail).kept_values == 25


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [([], 0), ([0.0] * 8, 4), ([1.0, 0.5, 0, 0, 0, 0, 0, 0], 4), ([math.nan] * 8, 4), ([1.0, 0.5, 0.2, 0.1] + [1e-200] * 4, 4)],
)
def test_kept_values_of_odd_spectra(spectrum, expected):
    cut = LayerCut(name="a", rank_before=4, rank_after=2, spectrum=spectrum, discarded=0.0)
    assert cut.kept_values == expected


def test_elapsed_counts_steps_and_reductions(data):
    compressed = parse_report(data).run("compressed")
    assert compressed.elapsed(30) == pytest.approx(30 * 0.008)
    assert compressed.elapsed(45) == pytest.approx(45 * 0.008 + 0.4)
    assert compressed.elapsed(201) is None


def test_sampling_noise(data):
    accuracy = (0.97 + 0.9732 + 0.95 + 0.96) / 4
    assert sampling_noise(parse_report(data)) == pytest.approx(1.96 * math.sqrt(2 * accuracy * (1 - accuracy) / 450))
    data["dataset"]["test"] = "many"
    assert sampling_noise(parse_report(data)) is None


def test_read_report(data, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert read_report(tmp_path) == data == read_report(tmp_path / "report.json")


def test_number_formats():
    assert [duration(s) for s in (None, 0.85, 14.24, 1385, 18_720)] == ["-", "850 ms", "14.2 s", "23 min 05 s", "5 h 12 min"]
    assert [milliseconds(s) for s in (None, 0.00701, 0.1234, 1.5)] == ["-", "7.01", "123", "1,500"]
    assert [significant(v) for v in (0.0, 1e-9, math.nan, 9.996)] == ["0", "1.00e-09", "-", "10.0"]
    assert [states(v) for v in ([], [8], [8, 8], [8, 9], [8, 9, 7, 6])] == ["-", "8", "2 x 8", "8, 9", "6..9 in 4 layers"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"runs": [', "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"format": 2, "runs": []}', "expected format 1, got 2"),
        ('{"runs": []}', "runs: "),
        ('{"runs": [{"title": "x"}]}', r"runs\.0\.name: "),
        ('{"runs": [{"name": "full", "curve": [{"step": "x"}]}]}', r"runs\.0\.curve\.0\.step: "),
        ('{"runs": [{"name": "full"}, {"name": "full"}]}', "names of runs must differ"),
        ('{"runs": [{"name": "full", "final": {"accuracy": "x"}}]}', "run 'full': accuracy is 'x', expected a number"),
        ('{"runs": [{"name": "a", "reductions": [{"step": 1, "accuracy_after": []}]}]}', r"run 'a': accuracy_after is \[\]"),
    ],
)
def test_damaged_reports(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_report(path)
    assert str(path) in str(caught.value)
    assert "compressm" in str(caught.value)
