"""The report of a training command: numbers, words, pictures and the page."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from compressm.compression.report import LayerReduction, ReductionReport
from compressm.errors import DataError
from compressm.experiments import drawing, plots
from compressm.experiments.report_data import LayerCut, parse_report, read_report, rows
from compressm.experiments.report_html import write_html
from compressm.experiments.summary import duration, headline, milliseconds, sampling_noise, significant, states, summary_table

HOSTILE = "<script>alert('x')</script> \" $x_{ [red]b[/red] \x1b[31m \ud800 <img src=http://evil.example/x.png>"
VOID = {"meta", "br", "img", "link", "hr"}
SPECTRUM = tuple(3.0 * 10 ** (-6 * index / 127) for index in range(128))


def layer(name, *, step_states=(64, 14), gramians="data", convention="real"):
    before, after = step_states
    spectrum = SPECTRUM if convention == "real" else SPECTRUM[:before]
    kept = 2 * after if convention == "real" else after
    return LayerReduction(
        name, before, after, spectrum, spectrum[:kept], convention, gramians,
        discarded=math.fsum(spectrum[kept:]) / math.fsum(spectrum), error_bound=None if gramians == "data" else 0.125,
        method="balanced", kernel_plan_before="lti_scan: cpp scan rows=1024 (modelled 1 ms forward)",
        kernel_plan_after="lti_scan: cpp block tau=8 (modelled 0.2 ms forward)",
    )  # fmt: skip


def run(name, *, accuracy, final_states, seconds, step, cut_at=None):
    steps, size = 200, [64, 64] if cut_at or name == "full" else list(final_states)
    curve = [
        {"step": s, "loss": 2.3 * math.exp(-s / 60), "accuracy": 0.5, "seconds_per_step": step,
         "states": size if cut_at is None or s <= cut_at else list(final_states)}
        for s in range(10, steps + 1, 10)
    ]  # fmt: skip
    reductions = []
    if cut_at:
        report = ReductionReport(cut_at, 0.4, "attempt 1 of 1", (layer("blocks.0.lru"), layer("blocks.1.lru")))
        reductions = [{**report.to_dict(), "accuracy_before": 0.61, "accuracy_after": 0.59}]
    return {
        "name": name, "title": name.replace("_", ", "), "steps": steps, "seed": 0, "parameters": 4122, "curve": curve,
        "evaluations": [{"step": s, "accuracy": accuracy * s / 200, "loss": 0.3} for s in (50, 100, 150, 200)],
        "reductions": reductions,
        "final": {
            "accuracy": accuracy, "loss": 0.3, "states": {f"blocks.{i}.lru": n for i, n in enumerate(final_states)},
            "seconds_total": seconds + 2, "seconds_training": seconds, "seconds_per_step": step,
        },
    }  # fmt: skip


@pytest.fixture
def data():
    """A report of all four runs."""
    small = (14, 14)
    runs = [
        run("compressed", accuracy=0.97, final_states=small, seconds=10.0, step=0.008, cut_at=40),
        run("full", accuracy=0.9732, final_states=(64, 64), seconds=15.0, step=0.012),
        run("small", accuracy=0.95, final_states=small, seconds=9.0, step=0.0071),
        run("small_narrow", accuracy=0.96, final_states=small, seconds=9.0, step=0.0071),
    ]
    medians = {"compressed": 0.0070, "full": 0.0126, "small": 0.0070, "small_narrow": 0.0070}
    timing = [{"name": name, "median": value, "p20": value * 0.9, "p80": value * 1.1} for name, value in medians.items()]
    return {
        "format": 1, "preset": "digits", "title": "Digits & more", "runs": runs,
        "config": {"tau": 0.05, "attempts": 1, "recipe": "default", "runs": [r["name"] for r in runs]},
        "machine": {"cpu": "Some CPU", "threads": 2}, "dataset": {"name": "digits", "train": 1347, "test": 450},
        "timing": {"repeats": 20, "steps": timing},
    }  # fmt: skip


class Page(HTMLParser):
    """Reads a page: tags, attributes and visible text; checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(data, folder):
    path = write_html(data, folder / "deep" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    loads = [v for k, v in page.attributes if k in {"src", "href", "xlink:href", "srcset", "data", "action"}]
    assert all(value.startswith("#") for value in loads), loads
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"@import|url\((?!#)", text)
    return page


def printed(data, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(summary_table(data))
    return console.file.getvalue()


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


def test_runs_have_one_colour_everywhere(data):
    report = parse_report(data)
    for make in plots.PICTURES.values():
        svg = make(report).svg
        for name in ("compressed", "full", "small", "small-narrow"):
            assert f"var(--run-{name}, " in svg
    assert len({drawing.colour(r.name) for r in report.runs} | {drawing.colour("other")}) == 5


def test_hostile_text_stays_text(data, tmp_path):
    data["title"] = data["preset"] = HOSTILE
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


@pytest.mark.parametrize("spectrum", [[], [0.0] * 128, [math.nan] * 128, [1.0] * 128, [1.0] + [0.0] * 127])
def test_odd_spectra_are_drawn(data, spectrum):
    for entry in data["runs"][0]["reductions"][0]["layers"]:
        entry |= {"spectrum": spectrum, "spectrum_after": spectrum[:28], "gramians": "data-free"}
    pictures = plots.spectra(parse_report(data))
    assert len(pictures) == 2 * bool(spectrum)
    assert all(picture.svg.startswith("<svg") for picture in pictures)


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


def test_thin_keeps_ends_and_gaps():
    points = [(step, None if step > 5000 else 2.0) for step in range(1, 10_001)]
    thinned = drawing.thin(points, 10.0)
    assert len(thinned) <= drawing.MAX_POINTS
    assert thinned[0][1] == 20.0
    assert thinned[-1] == (10_000, None)
    assert drawing.smooth([(1, 1.0), (2, None), (3, 3.0)], 3) == [(1, 1.0), (2, None), (3, 3.0)]
    assert drawing.thin([]) == []


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
    ],
)
def test_damaged_reports(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_report(path)
    assert str(path) in str(caught.value)
    assert "compressm" in str(caught.value)


def test_missing_report_and_unwritable_page(tmp_path):
    with pytest.raises(DataError, match=r"No such file.*expected the report\.json"):
        read_report(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="expected a place"):
        write_html({"runs": [{"name": "full"}]}, tmp_path / "file" / "report.html")
    with pytest.raises(DataError, match="expected a JSON object"):
        write_html([], tmp_path / "report.html")
