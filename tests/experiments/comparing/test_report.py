"""What a comparison says: verdicts, sentences, tables, and how soon a quality was reached."""

from __future__ import annotations

import io
import math

import pytest
from experiments.report_cases import HOSTILE, Page, barriers
from rich.console import Console
from scipy import stats

from compressm.experiments.comparing.design import Design
from compressm.experiments.comparing.jobs import best_multiple
from compressm.experiments.comparing.records import Entry
from compressm.experiments.comparing.results import Arm, Comparison, compare
from compressm.experiments.reports.compare_page import render
from compressm.experiments.reports.compare_words import remarks, sentence, tables

DESIGN = Design("digits", {"steps": 40}, ("compressed", "full", "small"), 4)


def entry(method, seed, score, *, metric="accuracy", multiple=1.0, teachers=0.0, tuning=False, step=0.5, title="Digits"):
    """A run of 40 steps whose metric goes from 0 to the score, evaluated every 10 steps."""
    curve = [{"step": s, "loss": 1 / s, "seconds_per_step": step, "states": [4]} for s in (10, 20, 30, 40)]
    evaluations = [{"step": s, metric: s / 40 * (score or 0.0), "loss": 0.1} for s in (10, 20, 30, 40)]
    final = {metric: score, "states": {"blocks.0.lru": 4}, "seconds_training": 40 * step, "seconds_per_step": step}
    body = {"name": method, "steps": 40, "seed": seed, "parameters": 100 + seed, "curve": curve, "evaluations": evaluations}
    return Entry(
        preset="digits", title=title, metric=metric, method=method, seed=seed, lr_multiple=multiple, tuning=tuning,
        diverged="" if score is not None else "the loss is nan", machine={"cpu": "Some CPU"}, state_bytes=32,
        dataset={"name": "images of digits"}, seconds_teachers=teachers, run={**body, "final": final},
    )  # fmt: skip


def arms(metric="accuracy", **scores):
    return [
        Arm(name, tuple(entry(name, seed, value, metric=metric) for seed, value in enumerate(values)), {}, None)
        for name, values in scores.items()
    ]


def comparison(found, quality=None, design=DESIGN, **options):
    return Comparison(design, tuple(found), tuple(compare(found, **options)), quality)


def printed(found, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(tables(found))
    return console.file.getvalue()


OURS = (0.90, 0.92, 0.91, 0.93)
WORSE = (0.80, 0.83, 0.80, 0.83)
LIKE = (0.93, 0.90, 0.92, 0.91)


def test_a_verdict_needs_a_small_p_and_knows_which_way_is_better():
    (pair,) = compare(arms(compressed=OURS, small=WORSE))
    assert (pair.ours, pair.theirs, pair.verdict) == ("compressed", "small", "better")
    assert math.isclose(pair.p, stats.ttest_rel(OURS, WORSE).pvalue)
    assert compare(arms(compressed=WORSE, small=OURS))[0].verdict == "worse"
    assert compare(arms("error_db", compressed=OURS, small=WORSE))[0].verdict == "worse"
    assert compare(arms("error_db", compressed=WORSE, small=OURS))[0].verdict == "better"
    assert compare(arms(compressed=OURS, small=LIKE))[0].verdict == "not resolved"


def test_more_pairs_ask_for_more_evidence():
    near = (0.885, 0.915, 0.895, 0.925)  # differences of 0.015 and 0.005 in turn
    single = compare(arms(compressed=OURS, small=near))[0]
    assert (single.verdict, 0.025 < single.p < 0.05) == ("better", True)
    both = compare(arms(compressed=OURS, small=near, full=LIKE))
    assert [pair.verdict for pair in both] == ["not resolved", "not resolved"]
    assert math.isclose(both[0].p, 2 * single.p)
    three = compare(arms(compressed=OURS, small=near, full=LIKE), all_pairs=True)
    assert [(pair.ours, pair.theirs) for pair in three] == [("compressed", "small"), ("compressed", "full"), ("small", "full")]


def test_pairs_share_their_seeds():
    ours, theirs = arms(compressed=(0.9, None, 0.8, 0.7), small=(0.6, 0.5, None, 0.5))
    (pair,) = compare([ours, theirs])
    assert pair.difference.count == 2
    assert math.isclose(pair.difference.mean, (0.3 + 0.2) / 2)
    assert (ours.diverged, ours.score.count) == (1, 3)
    assert compare(arms(compressed=(0.9, None), small=(None, 0.5))) == []


def test_sentences_are_plain():
    found = comparison(arms(compressed=OURS, small=WORSE, full=LIKE))
    low, high = (100 * value for value in stats.ttest_rel(OURS, WORSE).confidence_interval(0.95))
    assert sentence(found, found.pairs[0]) == (
        f"Compressed in training is better than small from scratch: by 10.00 points (95 % interval {low:+.2f} to {high:+.2f}, "
        "4 seeds, p < 0.001 after correction)."
    )
    text = sentence(found, found.pairs[1])
    assert text.startswith("Compressed in training and full size: not resolved; +0.00 points (95 % interval -")
    alone = comparison(arms(compressed=(0.9,), small=(0.8,)))
    assert sentence(alone, alone.pairs[0]) == (
        "Compressed in training and small from scratch: not resolved; +10.00 points with the one seed that they share, which "
        "says nothing of others."
    )


def test_steps_and_seconds_until_a_quality():
    """Scores rise evenly to the last step, at half a second each; 0.6 is reached at step 30 by 0.8 to 1.2, at 40 by 0.7."""
    slow, fast = entry("small", 0, 0.7), entry("small", 1, 0.9, teachers=100.0)
    assert slow.reached(0.6) == (40, 20.0)
    assert fast.reached(0.6) == (30, 115.0)
    assert slow.reached(0.71) is None
    arm = Arm("small", (slow, fast), {}, None)
    assert arm.to_quality(0.6) == (2, 35.0, 67.5)
    assert arm.to_quality(0.8) == (1, 40.0, 120.0)
    assert arm.to_quality(1.0) == (0, None, None)
    assert arm.mean("seconds_training") == (20 + 120) / 2
    falling = entry("small", 0, -40.0, metric="error_db")
    assert falling.reached(-25.0) == (30, 15.0)
    found = comparison([arm], quality=0.8)
    assert "40 (1)" in printed(found)
    assert any(note.startswith("(n): only so many") for note in remarks(found))
    assert any("includes that of the teacher" in note for note in remarks(found))


def test_the_best_multiple_is_chosen_by_the_mean_and_never_by_a_run_that_diverged():
    def tried(metric, *scores):
        return [entry("full", 0, value, metric=metric, multiple=m, tuning=True) for m, value in scores]

    assert best_multiple(tried("accuracy", (1.0, 0.5), (1.0, 0.7), (2.0, 0.65), (2.0, 0.65))) == 2.0
    assert best_multiple(tried("error_db", (1.0, -5.0), (1.0, -7.0), (2.0, -6.5), (2.0, -4.5))) == 1.0
    assert best_multiple(tried("accuracy", (1.0, 0.5), (2.0, 0.9), (2.0, None))) == 1.0
    assert best_multiple(tried("accuracy", (3.0, None), (0.5, None), (1.0, None))) == 0.5


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(width):
    found = comparison(arms(compressed=OURS, hankel_norm=WORSE, after_magnitude=LIKE), quality=0.5)
    text = printed(found, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for expected in ("91.50 ± 0.65", "magnitude pruning", "20.0s", "better", "p: paired t-test, corrected for 2", "x1"):
        assert expected in text
    assert "No learning rate was tuned" in text


def test_page_says_its_data_and_seeds_and_is_for_all():
    design = Design("digits", {"steps": 40}, ("compressed", "small"), 4, (1.0, 3.0), 2)
    found = [Arm(arm.name, arm.entries, {1.0: 0.9, 3.0: 0.8}, None) for arm in arms(compressed=OURS, small=WORSE)]
    page = render(comparison(found, quality=0.5, design=design))
    assert barriers(page) == []
    text = Page(page).text
    assert "compressm compare digits; data: images of digits; seeds 0, 1, 2 and 3" in text
    assert "91.50 ± 0.65" in text
    assert "Test accuracy, %" in text
    assert "mean and standard error" in text


def test_what_is_missing_and_hostile_is_said_and_harmless():
    found = [Arm("small", (entry("small", 0, 0.5, title=HOSTILE),), {1.0: 0.4, 3.0: 0.3}, None)]
    design = Design("sysid", {}, ("small",), 3, (1.0, 3.0), 2)
    whole = comparison(found, quality=0.4, design=design)
    notes = " ".join(remarks(whole))
    assert "2 of 3 runs are missing" in notes
    assert "*: the end of the range that was tried" in notes
    page = Page(render(whole))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("svg") == 4  # no pair, no picture of pairs
    assert page.tags.count("strong") == 1
    assert whole.to_dict()["arms"][0]["to_quality"] == {"reached": 1, "steps": 40.0, "seconds": 20.0}
