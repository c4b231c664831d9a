"""The speed report: its numbers, that it hides no loss and drops no figure, and that it is the same for the same files."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.run_cases import missing, run_of, step, table_with, tables, timed
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from reporting import report
from reporting.modelled import Modelled, section
from reporting.wording import number
from typer.testing import CliRunner

from compressm.benchmarking.results import Missing
from compressm.errors import ArgumentError, DataError

HOSTILE = "a|b`c<script>\n# d **e** [f](g) \\|"


def lines_of(*results, **more):
    return report.build({"cpu": run_of(*results, **more)}).lines


def scans(ours, peers, **shape):
    return [timed(median=ours, limit=1.0, **shape), *(timed(contender=name, median=t, **shape) for name, t in peers.items())]


def test_headline():
    smnist = [step("smnist", n, 4 + n / 16) for n in (256, 128, 64)]
    mamba = [step("mamba-lm", n, t, spread=0.1) for n, t in ((128, 30.0), (12, 10.0))]
    rows = table_with(lines_of(*mamba, *smnist), "whole training step")
    assert [row["speed-up"] for row in rows[:2]] == ["1", "**3.00x (2.45–3.67)**"]
    assert [row["speed-up"] for row in rows[2:]] == ["1", "**1.67x (1.51–1.84)**", "**2.50x (2.26–2.76)**"]
    assert [row["published"] for row in rows] == ["–", "about 4x", "–", "–", "–"]
    assert [row["independent of N"] for row in rows if row["whole training step"]] == ["–", "20 %, at most 5.00x"]
    assert rows[2]["ms"] == "20.0 (19.0–21.0)"
    assert rows[2]["whole training step"] == "**sMNIST (LRU)**<br>B50"


def test_headline_of_a_step_without_a_constant_part_and_of_a_poor_line():
    lines = lines_of(*(step("smnist", n, n / 16) for n in (256, 128, 64)))
    assert table_with(lines, "whole training step")[0]["independent of N"] in ("0.0 %", "0.0 %, no bound")
    bent = lines_of(*(step("smnist", n, t) for n, t in ((256, 20.0), (128, 19.0), (16, 5.0))))
    assert any("misses a time by" in line for line in bent)
    assert not any("misses a time by" in line for line in lines)


def test_a_single_round_has_no_spread():
    lines = lines_of(step("smnist", 256, 30.0, spread=0.0, rounds=1), step("smnist", 28, 20.0))
    rows = table_with(lines, "whole training step")
    assert [(row["ms"], row["speed-up"]) for row in rows] == [("30.0 (once)", "1"), ("20.0 (19.0–21.0)", "**1.50x (once)**")]


def test_published_figure_for_cifar_stands_beside_the_smallest_size():
    lines = lines_of(*(step("scifar", n, n + 50.0) for n in (384, 161, 57)))
    assert [row["published"] for row in table_with(lines, "whole training step")] == ["–", "–", "up to 1.5x"]
    assert any("6 blocks and batch 50" in line for line in lines)


def test_ratios_and_who_is_faster():
    lines = lines_of(*scans(2.0, {"slow": 10.0, "even": 2.1, "quick": 1.0}))
    row = table_with(lines, "shape", "compressm, ms", "quick")[0]
    assert row["compressm, ms"] == "2.00"
    assert row["slow"] == "10.0 (5.00x)"
    assert row["even"] == "2.10 (1.05x, same)"
    assert row["quick"] == "**1.00 (0.500x)**"
    assert row["of the limit, set by"] == "50 %, memory"
    assert table_with(lines, "peer faster")[0] | {"machine": ""} == {
        "machine": "", "compressm faster": "1", "spreads overlap": "1", "peer faster": "**1**", "failed": "0",
    }  # fmt: skip
    assert table_with(lines, "peer faster by") == [
        {"computation": "Selective scan, forward, B2 L64 N16", "peer": "`quick`", "ms, peer / compressm": "1.00 / 2.00",
         "peer faster by": "2.00x (1.81–2.21)"}
    ]  # fmt: skip


def test_no_loss_is_said_plainly():
    assert "Nowhere beyond the spread. Comparisons: 1." in lines_of(*scans(2.0, {"slow": 10.0}))
    assert "No peer was timed." in lines_of(timed())


def test_variants_of_ours_are_no_peers():
    lines = lines_of(*scans(2.0, {"compressm, compiled": 1.0, "jax": 4.0}))
    assert table_with(lines, "peer faster")[0]["peer faster"] == "0"
    assert table_with(lines, "shape", "jax")[0]["compressm, compiled"] == "**1.00 (0.500x)**"


def test_speed_up_of_every_contender_over_its_own_full_size():
    ours = [step("smnist", n, t) for n, t in ((256, 30.0), (28, 20.0))]
    original = [step("smnist", n, t, "original") for n, t in ((256, 1000.0), (28, 100.0), (13, 50.0))]
    rows = table_with(lines_of(*ours, *original), "training step", "original")
    assert rows == [
        {"training step": "sMNIST (LRU), B50", "states": "256 → 28", "compressm": "1.50x", "original": "10.0x"},
        {"training step": "sMNIST (LRU), B50", "states": "256 → 13", "compressm": "–", "original": "20.0x"},
    ]


def test_dtypes_stand_apart_and_one_round_is_said():
    results = [timed(median=1.0), timed(contender="jax", median=3.0, spread=0.0, rounds=1)]
    results += [timed(median=2.0, dtype="bfloat16", group="selective_scan N16 forward bfloat16")]
    lines = lines_of(*results)
    assert table_with(lines, "shape", "jax")[0]["jax"] == "3.00 (3.00x, once)"
    assert {"**forward**", "**forward, bfloat16**"} <= set(lines)
    assert table_with(lines[lines.index("**forward, bfloat16**") :], "shape") == [
        {"shape": "N16", "compressm, ms": "2.00", "of the limit, set by": "–"}
    ]


def test_all_figures():
    ours = timed(median=2.0, limit=0.5, peak=3 << 20, error=2.2e-7, rounds=7)
    ours, jax = table_with(lines_of(ours, timed(contender="jax", median=3.0, peak=None)), "peak memory", "contender")
    assert (ours["ms"], ours["20–80 %"], ours["rounds"], ours["over compressm"]) == ("2.00", "1.90–2.10", "7", "1")
    assert (ours["peak memory"], ours["error"], ours["of the limit"]) == ("3.00 MiB", "2e-7", "25 %")
    assert (jax["over compressm"], jax["peak memory"], jax["of the limit"]) == ("1.50x (1.36–1.66)", "–", "–")


def test_share_of_the_limit():
    results = [timed(median=2.0, limit=1.0, states=n, length=8, by=by) for n, by in ((4, "bytes"), (8, "exponentials"))]
    results += [timed(median=4.0, limit=1.0, states=16, length=8, by="bytes"), timed("lti_scan", median=1.0)]
    results += [timed(contender="jax", median=5.0, limit=1.0, states=4, length=8)]
    (row,) = table_with(lines_of(*results), "compressm reaches")
    assert row["compressm reaches"] == "25 % to 50 %"
    assert row["limit set by"] == "memory, exponentials"
    assert (row["shapes"], row["best of any peer"]) == ("3", "20 %")


def test_slopes():
    along_n = [timed(median=0.5 * n**0.5, states=n, length=64) for n in (4, 16, 64)]
    along_l = [timed(median=2.0 * n / 64, states=16, length=n) for n in (128, 256)]
    peers = [timed(contender="jax", median=3.0 * n, states=n, length=64) for n in (4, 8, 16)]
    rows = table_with(lines_of(*along_n, *along_l, *peers), "along")
    assert rows == [
        {"along": "states 4–64", "at": "L64", "pass": "forward", "compressm": "0.50", "jax": "1.00 (4–16)"},
        {"along": "length 64–256", "at": "N16", "pass": "forward", "compressm": "1.00", "jax": "–"},
    ]
    assert "### Growth" not in lines_of(*along_n[:2])


def test_what_has_no_time_is_listed_with_its_reason():
    group = "selective_scan B2 L64 N16 forward"
    skipped = [missing("mamba_ssm", "needs nvcc", f"{group} {i}") for i in range(5)]
    failed = [missing("s5", "wrong: error 1 | 2"), missing("compressm", "raised", "other")]
    lines = lines_of(*scans(2.0, {"jax": 3.0}), timed(contender="s5", group="else"), skipped=skipped, failed=failed)
    rows = table_with(lines, "contender", "why")
    assert [(row["contender"], row[""], row["why"]) for row in rows] == [
        ("`s5`", "**failed**", r"wrong: error 1 \| 2"), ("`compressm`", "**failed**", "raised"),
        ("`mamba_ssm`", "skipped", "needs nvcc"),
    ]  # fmt: skip
    assert "5 computations" in rows[2]["where"]
    assert r"selective\_scan B2 L64 N16 forward 4" in rows[2]["where"]
    assert table_with(lines, "shape", "s5")[0]["s5"] == "failed"
    assert "**compressm failed** in other: raised." in lines


def test_without_ours_a_peer_has_a_time_and_no_ratio():
    lines = lines_of(timed(contender="jax", median=3.0), failed=[missing("compressm", "raised")])
    row = table_with(lines, "shape", "jax")[0]
    assert (row["compressm, ms"], row["jax"]) == ("failed", "3.00")


def test_machine_and_method():
    text = "\n".join(lines_of(timed(), matmul_1024_ms={"median": 6.2, "best": 6.0}))
    for words in ("Test CPU, device cpu, 2 cores, 2 threads", "copies 20.0 GB/s", "300 GFLOP/s", "10.0 billion exponentials",
                  "jax 0.10.2", "`0123456789ab`", "at best 6.00 ms;",
                  "half of all times have a spread wider than 10 % of their median.", "## How it was measured"):  # fmt: skip
        assert words in text, words
    busy = "\n".join(lines_of(timed(), matmul_1024_ms={"median": 12.0, "best": 6.0}, commit="0" * 40 + "-dirty"))
    assert "**Other work was going on" in busy
    scattered = lines_of(timed(spread=0.05), *(timed(op, spread=0.2) for op in ("lti_scan", "lru")))
    assert "**Other work was going on" in "\n".join(scattered)
    assert "**Other work" not in text
    assert "`000000000000-dirty`" in busy


def test_machines_side_by_side():
    runs = {
        "cpu": run_of(*(step("smnist", n, float(n)) for n in (256, 13))),
        "h100": run_of(*(step("smnist", n, 0.1 * n) for n in (256, 13)), device="NVIDIA H100"),
        "cpu-2": run_of(timed()),
    }
    page = report.build(runs)
    titles = [line for line in page.lines if line.startswith("## ")][2:-1]
    assert titles == ["## Test CPU, 2 threads (cpu)", "## NVIDIA H100", "## Test CPU, 2 threads (cpu-2)"]
    rows = table_with(page.lines, "whole training step")
    assert [row["ms"][:4] for row in rows] == ["256 ", "13.0", "25.6", "1.30"]
    assert "NVIDIA H100" in rows[2]["whole training step"]
    assert {"cpu-steps.png", "h100-steps.png"} <= set(page.pictures)


def test_pictures():
    results = [r for n in (4, 16, 64) for r in scans(float(n), {"jax": 3.0 * n, "loop": 0.5 * n}, states=n, length=64)]
    page = report.build({"cpu": run_of(*results, *(step("smnist", n, 4 + n / 16) for n in (256, 128, 64)))})
    assert set(page.pictures) == {
        "cpu-steps.png", "cpu-limits.png", "cpu-selective-scan.png", "cpu-selective-scan-growth.png",
    }  # fmt: skip
    for name, draw in page.pictures.items():
        png = draw()
        with Image.open(io.BytesIO(png)) as image:
            assert image.width == 1200, name
            assert image.height > 150, name
            assert len(image.convert("RGB").getcolors(1 << 16)) > 10, name
            assert not image.info.keys() & {"Software", "date", "Creation Time"}, name
        assert len(png) < 100_000, name
        assert any(line.endswith(f"(figures/{name})") for line in page.lines)


def test_hostile_names_stay_inside_their_cells():
    hostile = {"op": "op|`" + HOSTILE, "group": HOSTILE, "limit": 1.0, "states": 4, HOSTILE: 2}
    failed = [Missing(group=HOSTILE, contender="x", reason=HOSTILE)]
    machine = {"cpu": HOSTILE, "date": HOSTILE, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    run = run_of(timed(**hostile), timed(contender=HOSTILE, **hostile), failed=failed, **machine)
    page, plain = report.build({HOSTILE: run}), report.build({"cpu": run_of(*scans(2.0, {"jax": 2.0}))})
    assert len(tables(page.lines)) == len(tables(plain.lines)) + 1  # what failed
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render("\n".join(page.lines))
    assert "<script" not in html
    assert "<em>" not in html
    assert re.findall("href=[^>]*", html) == ['href="#how-it-was-measured"']
    assert html.count("<h1>") == 1
    for draw in page.pictures.values():
        draw()


def compiled(**more):
    kernel = {
        "library": "compressm", "name": "ssd_states", "states": 128, "registers": 128, "spills": 0, "shared": 33792,
        "instructions": 1234, "products": 32, "tiles": {"T": 64, "warps": 8}, "steps": 64, "programs": 2, **more,
    }  # fmt: skip
    traffic = [{"library": name, "states": n, "bytes": n * 2.5} for name in ("compressm", "mamba_ssm") for n in (16, 128)]
    found = {"title": "A scan", "axis": "N", "libraries": {"mamba_ssm": "2.3"}, "kernels": [kernel], "traffic": traffic}
    return Modelled.model_validate({"target": "sm_90", "versions": {"triton": "3.9"}, "computations": [found]})


def test_kernels_that_were_compiled_and_not_run_have_a_section_of_their_own(tmp_path):
    plain = report.build({"cpu": run_of(timed())}).lines
    lines = report.build({"cpu": run_of(timed())}, compiled()).lines
    added = lines[lines.index("## Modelled, not run") : lines.index("## How it was measured")]
    assert [line for line in lines if line not in added] == [line for line in plain if line not in added]
    assert table_with(added, "library") == [
        {"library": f"`{name}`", "N=128": "320", "N=16": "40.0"} for name in ("compressm", "mamba_ssm")
    ]
    assert table_with(added, "spilled bytes") == [
        {"kernel": "compressm `ssd_states`", "N": "128", "registers": "128", "spilled bytes": "0", "shared, KiB": "33.0",
         "instructions": "1,234", "per token": "308", "matrix products": "32", "tiles": "T=64 warps=8"}
    ]  # fmt: skip
    assert "### A scan (mamba\\_ssm 2.3)" in added
    assert "instructions times the warps of a program times the programs that a head needs" in "".join(added)
    hostile = report.build({"cpu": run_of(timed())}, compiled(library=HOSTILE, name=HOSTILE)).lines
    assert len(tables(hostile)) == len(tables(lines))
    run_of(timed()).save(tmp_path / "cpu.json")
    compiled().save(tmp_path / "modelled.json")
    report.write([tmp_path / "cpu.json"], tmp_path / "R.md", tmp_path / "modelled.json")
    assert "No machine has run it" in (tmp_path / "R.md").read_text()
    (tmp_path / "modelled.json").write_text("{}")
    with pytest.raises(DataError, match=r"modelled\.json: holds no figures"):
        report.write([tmp_path / "cpu.json"], tmp_path / "R.md", tmp_path / "modelled.json")


def test_the_report_holds_the_compiled_kernels_of_every_computation():
    benchmarks = Path(report.__file__).parents[1]
    found = Modelled.load(benchmarks / "modelled.json")
    assert "\n".join(section(found)) in (benchmarks / "REPORT.md").read_text(encoding="utf-8")
    assert [computation.axis for computation in found.computations] == ["N", "K", "K"]
    for computation in found.computations:
        sizes = {(k.library, k.states) for k in computation.kernels}
        assert {("compressm", n) for n in (128, 64, 32, 16)} <= sizes
        assert {library for library, _ in sizes} == {entry.library for entry in computation.traffic}


FIGURE = st.floats(1e-4, 1e5)


@st.composite
def results(draw):
    """Any set of results: peers missing, single results, no spread, no limit."""
    found = {}
    for _ in range(draw(st.integers(0, 9))):
        level = draw(st.sampled_from(["op", "layer", "step", "reduction"]))
        passes = "step" if level in ("step", "reduction") else draw(st.sampled_from(["forward", "forward+backward"]))
        shape = {"batch": draw(st.sampled_from([1, 2])), "states": draw(st.sampled_from([1, 4, 16, 64]))}
        op = {"op": "selective_scan", "layer": "lru", "step": "smnist", "reduction": "attempt"}[level]
        contender = draw(st.sampled_from(["compressm", "compressm", "jax", "loop", "compressm, paper"]))
        made = timed(
            op, contender, draw(FIGURE), level=level, passes=passes, spread=draw(st.sampled_from([0.0, 0.1, 0.9])),
            limit=draw(st.none() | FIGURE), by=draw(st.sampled_from(["bytes", "flops", "exponentials"])),
            peak=draw(st.none() | st.integers(0, 1 << 40)), error=draw(st.just(0.0) | st.floats(1e-300, 1e300)), **shape,
        )  # fmt: skip
        found[made.group, contender] = made
    return list(found.values())


@settings(max_examples=100, deadline=None)
@given(results())
def test_no_time_is_dropped(found):
    page = report.build({"cpu": run_of(*found)})
    text = "\n".join(page.lines)
    tables(page.lines)
    for result in found:
        assert number(result.milliseconds.median) in text, result
    assert "nan" not in text


@settings(max_examples=8, deadline=None)
@given(results())
def test_any_run_can_be_drawn(found):
    for draw in report.build({"cpu": run_of(*found)}).pictures.values():
        assert draw().startswith(b"\x89PNG")


def test_written_twice_it_is_the_same_and_old_pictures_go(tmp_path):
    runner, out = CliRunner(), tmp_path / "deep" / "REPORT.md"
    path = tmp_path / "cpu.json"
    run_of(*scans(2.0, {"jax": 3.0}), *(step("smnist", n, 4 + n / 16) for n in (256, 128, 64))).save(path)
    first = runner.invoke(report.app, [str(path), "--out", str(out)])
    assert first.exit_code == 0, first.output
    assert "1 result file, 3 pictures" in first.output
    before = {p.relative_to(tmp_path): p.read_bytes() for p in out.parent.rglob("*.*")}
    assert len(before) == 4
    runner.invoke(report.app, [str(path), "--out", str(out)])
    assert {p.relative_to(tmp_path): p.read_bytes() for p in out.parent.rglob("*.*")} == before
    (out.parent / "figures" / "own.png").write_bytes(b"mine")
    run_of(timed()).save(path)
    assert runner.invoke(report.app, [str(path), "--out", str(out)]).exit_code == 0
    assert [p.name for p in (out.parent / "figures").iterdir()] == ["own.png"]


def test_errors_name_the_file_and_the_way_out(tmp_path):
    path = tmp_path / "cpu.json"
    run_of(timed()).save(path)
    with pytest.raises(ArgumentError, match="make bench"):
        report.build({})
    with pytest.raises(ArgumentError, match="different names"):
        report.write([path, tmp_path / "cpu.json"], tmp_path / "R.md")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--out"):
        report.write([path], tmp_path / "file" / "R.md")
    path.write_text(json.dumps({"format": 2}))
    failed = CliRunner().invoke(report.app, [str(path)])
    assert failed.exit_code == 2
    assert "cpu.json: format" in failed.output


def test_runs_as_a_module(tmp_path):
    run_of(timed()).save(tmp_path / "cpu.json")
    command = [sys.executable, "-m", "benchmarks.reporting.report", str(tmp_path / "cpu.json"), "--out", str(tmp_path / "R.md")]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(report.__file__).parents[2])
    assert (tmp_path / "R.md").read_text().startswith("# Speed report\n")
