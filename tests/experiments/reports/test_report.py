"""The report of a training command in words, as a table and as a page."""

from __future__ import annotations

import copy
import math
import re

import pytest
from experiments.report_cases import HOSTILE, barriers, page_of, printed

from compressm.errors import DataError
from compressm.experiments.reports import plots
from compressm.experiments.reports.data import parse_report, read_report
from compressm.experiments.reports.html import render, write_html
from compressm.experiments.reports.summary import headline, origin, significant


def test_headline_says_the_gain(data):
    assert headline(data) == (
        "While it trained, the model shrank from 128 to 28 states in 2 layers: test accuracy 97.00 %, 0.32 points below the "
        "full-size run, 2.00 points above the run that was small from the start and 1.00 points above the small one with "
        "narrow initial phases. A training step takes 7.00 ms instead of 12.6 ms (1.80x the speed of full size), and training "
        "took 10.0 s in all instead of 15.0 s (33 % less)."
    )


def test_headline_hides_no_control_that_does_better(data):
    data["runs"][3]["final"]["accuracy"] = 0.98
    assert "2.00 points above the run that was small from the start and 1.00 points below the small one with" in headline(data)
    data["runs"] = data["runs"][:2]
    assert "97.00 %, 0.32 points below the full-size run. A training step" in headline(data)


def test_table_fits_a_terminal_of_100_columns(data):
    data["runs"][1]["final"] |= {"seconds_training": 36_000.0, "seconds_total": 40_000.0}
    data["runs"][1]["parameters"] = 123_456_789
    data["runs"][1]["final"]["states"] = {f"blocks.{i}": 300 + i for i in range(12)}
    text = printed(data)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for expected in ("97.00", "-0.32", "2 x 14", "1.80x", "10.0s", "12.0s", "10h00m", "123M", "300..311", "interleaved"):
        assert expected in text
        assert expected in printed(data, 80)


def test_page_holds_the_numbers(data, tmp_path):
    text = page_of(data, tmp_path).text
    for expected in (
        "Digits & more", "128 → 28", "97.00 %", "−0.32", "1.80×", "4,122", "6.30–7.70", "interleaved, 20 rounds", "step 40",
        "test accuracy 61.00 % → 59.00 %", "took 400 ms", "64 → 14", "real spectrum (2N values per layer), data Gramians",
        "lti_scan: cpp scan rows=1024", "lti_scan: cpp block tau=8", "balanced", "Some CPU", "1347", "tau = 0.05 is the",
    ):  # fmt: skip
        assert expected in text, expected
    discarded = data["runs"][0]["reductions"][0]["layers"][0]["discarded"]
    assert f"{significant(100 * discarded)} %" in text


def test_page_holds_the_pictures(data, tmp_path):
    page = page_of(data, tmp_path)
    assert page.tags.count("svg") == len(plots.PICTURES) + 2  # and one spectrum per layer
    assert page.tags.count("figure") == page.tags.count("svg")
    for expected in ("128 → 28 values", "training loss, log scale", "ms per training step", "states cut", "test accuracy, %"):
        assert expected in page.text
    again = write_html(parse_report(data), tmp_path / "again.html")
    assert again.read_bytes() == (tmp_path / "deep" / "report.html").read_bytes()


def test_page_is_for_all(data):
    page = render(parse_report(data))
    assert barriers(page) == []
    found = barriers(page.replace('lang="en"', "").replace('role="img"', "").replace("--soft: #57606a", "--soft: #a0a0a0"))
    assert {"no language", "a picture without a name", "soft #a0a0a0 on page #ffffff"} <= set(found)


def test_page_says_its_data_and_seeds(data, tmp_path):
    text = page_of(data, tmp_path).text
    assert "compressm train digits; data: digits; seed 0" in text
    assert "One run each, so without standard errors" in text
    assert origin("x", {}, [2, None, 1, 2, 0]) == "x; seeds 0, 1 and 2"


def test_hostile_text_stays_text(data, tmp_path):
    data["title"] = data["preset"] = HOSTILE
    data["notes"] = [HOSTILE]
    data["runs"][0]["title"] = HOSTILE
    reduction = data["runs"][0]["reductions"][0]
    reduction["reason"] = HOSTILE
    reduction["layers"][0] |= {"name": HOSTILE, "method": HOSTILE, "kernel_plan_before": HOSTILE, "gramians": HOSTILE}
    for part in ("config", "machine", "dataset"):
        data[part] |= {HOSTILE: [HOSTILE, {"key": HOSTILE}], "tau": HOSTILE}
    page = page_of(data, tmp_path)
    assert "img" not in page.tags
    assert page.text.count("<script>alert('x')</script>") > 8
    text = printed(data)
    assert "\x1b" not in text
    assert "[red]b[/red]" in text
    assert "\x1b" not in headline(data)


@pytest.mark.parametrize("name", ["compressed", "full"])
def test_single_runs(data, tmp_path, name):
    data["runs"] = [r for r in data["runs"] if r["name"] == name]
    data["timing"] = None
    text = headline(data)
    assert "full size" not in text
    assert "full-size" not in text
    assert ("from 128 to 28 states" if name == "compressed" else "Full (128 states in 2 layers)") in text
    page = page_of(data, tmp_path)
    assert "Gap to full" not in page.text
    assert "not interleaved" in page.text
    assert page.tags.count("svg") == len(plots.PICTURES) + (2 if name == "compressed" else 0)
    assert ("No reductions:" in page.text) == (name == "full")
    assert "not interleaved" in printed(data)


def test_missing_parts_are_said(tmp_path):
    data = {"runs": [{"name": "full"}]}
    assert headline(data) == "Full: the report holds no results."
    page = page_of(data, tmp_path)
    assert "svg" not in page.tags
    for words in [*plots.PICTURES, "No spectra:", "No reductions:", "The report does not say."]:
        assert words.format(score="test accuracy") in page.text
    assert "Full" in printed(data)


@pytest.mark.parametrize("part", ["accuracy", "seconds_training", "seconds_per_step", "states"])
def test_missing_final_values(data, tmp_path, part):
    for entry in data["runs"]:
        entry["final"].pop(part)
        entry |= {"curve": [], "evaluations": [], "reductions": []}
    data["timing"] = None
    words = {"accuracy": "test accuracy", "seconds_training": "training took", "seconds_per_step": " step ", "states": "states"}
    assert words[part] not in headline(data)
    page_of(data, tmp_path)
    printed(data)


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_diverged_run(data, tmp_path, nothing):
    full, compressed = data["runs"][1], data["runs"][0]
    for point in full["curve"][5:]:
        point |= {"loss": nothing, "accuracy": nothing}
    full["evaluations"][-1] |= {"accuracy": nothing, "loss": nothing}
    full["final"] |= {"accuracy": nothing, "loss": nothing, "seconds_per_step": nothing}
    data["timing"]["steps"][1]["median"] = nothing
    compressed["reductions"][0] |= {"accuracy_before": nothing, "accuracy_after": nothing}
    report = parse_report(data)
    assert report.run("full").diverged
    assert not report.run("compressed").diverged
    assert "points above the run that was small" in headline(data)
    page = page_of(data, tmp_path)
    assert "Full (diverged)" in page.text
    assert not re.search(r"\bnan\b|\binf\b", page.text)
    assert not re.search(r"\bnan\b|\binf\b", printed(data))
    data["runs"] = [full]
    assert "diverged" in headline(data)


def test_all_measurements_missing_from_curves(data, tmp_path):
    for entry in data["runs"]:
        entry["curve"] = [{"step": point["step"], "loss": None} for point in entry["curve"]]
    text = page_of(data, tmp_path).text
    assert "No training loss:" in text
    assert "No step times:" in text
    assert "No test accuracy by time:" in text


def test_nothing_cut(data, tmp_path):
    for entry in data["runs"][0]["reductions"][0]["layers"]:
        entry |= {"rank_after": 64, "spectrum_after": entry["spectrum"], "discarded": 0.0, "method": "identity"}
    data["runs"][0]["final"]["states"] = {"a": 64, "b": 64}
    assert headline(data).startswith("Nothing was cut, the model keeps its 128 states in 2 layers")
    text = page_of(data, tmp_path).text
    assert "nothing cut" in text
    assert "states cut" not in text
    assert "64, unchanged" in text


def test_several_attempts(data, tmp_path):
    first = data["runs"][0]["reductions"][0]
    second = copy.deepcopy(first) | {"step": 60}
    for entry in second["layers"]:
        kept = entry["spectrum_after"]
        entry |= {"rank_before": 14, "rank_after": 10, "spectrum": kept, "spectrum_after": kept[:20]}
    data["runs"] = data["runs"][:1]
    data["runs"][0] |= {"reductions": [first, second], "curve": [], "evaluations": []}
    data["config"]["attempts"] = 2
    text = page_of(data, tmp_path).text
    assert "128 → 28 → 20 values" in text
    assert "All 2 attempts share it." in text
    data["config"]["recipe"] = "paper"
    assert "Each of the 2 attempts may cut that much again." in page_of(data, tmp_path).text


def test_missing_report_and_unwritable_page(tmp_path):
    with pytest.raises(DataError, match=r"no such file, expected the report\.json"):
        read_report(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="expected a place"):
        write_html({"runs": [{"name": "full"}]}, tmp_path / "file" / "report.html")
    with pytest.raises(DataError, match="expected a JSON object"):
        write_html([], tmp_path / "report.html")
