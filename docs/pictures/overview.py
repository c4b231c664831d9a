"""Draws the picture of the first page, wide and for phones:  python docs/pictures/overview.py RUN, a folder of
compressm train digits.

The spectrum is the first reduction of that run, the times are those of benchmarks/results/cpu.json, the accuracies those of the
table in docs/performance.md (sequential MNIST, 20,000 steps, seed 0).
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ACCURACY = {"full size,\n256 states": 93.4, "compressed\nto 20": 92.0, "small, 20,\nnarrow phases": 90.6, "small, 20": 81.1}
INK = {"light": "#1f2328", "dark": "#d7dae0"}
KEPT, CUT = "#2a78d6", "#c0784a"
SHAPES = {"": ((10.2, 3.1), (1, 3)), "tall-": ((4.4, 8.4), (3, 1))}


def draw(run: Path, theme: str, shape: str) -> None:
    matplotlib.rcParams.update({"text.color": INK[theme], "axes.labelcolor": INK[theme], "axes.edgecolor": INK[theme]})
    matplotlib.rcParams.update({"xtick.color": INK[theme], "ytick.color": INK[theme], "svg.fonttype": "path", "font.size": 9})
    matplotlib.rcParams["svg.hashsalt"] = "compressm"
    size, grid = SHAPES[shape]
    figure = Figure(figsize=size, layout="constrained")
    left, middle, right = figure.subplots(*grid)
    for axis in (left, middle, right):
        axis.set_facecolor("none")
        axis.spines[["top", "right"]].set_visible(False)

    (compressed,) = (entry for entry in json.loads((run / "report.json").read_text())["runs"] if entry["name"] == "compressed")
    layer = compressed["reductions"][0]["layers"][0]
    values, kept = layer["spectrum"], layer["rank_after"]
    order = len(layer["spectrum_after"])
    shares = [value / values[0] for value in values]
    left.stairs(shares[:order], range(order + 1), baseline=1e-9, fill=True, color=KEPT)
    left.stairs(shares[order:], range(order, len(shares) + 1), baseline=1e-9, fill=True, color=CUT)
    left.axvline(order, color=INK[theme], linestyle=":")
    left.set(yscale="log", ylim=(1e-4, 1.5), xlim=(0, len(shares)), xlabel="Hankel singular values, largest = 1")
    left.set_title(f"spectrum and cut: {layer['rank_before']} → {kept} states", fontsize=10)

    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["results"]
    steps = [r for r in results if r["op"] == "smnist" and r["contender"] == "compressm"]
    times = sorted((r["shape"]["states"], r["milliseconds"]["median"]) for r in steps)
    middle.plot(*zip(*times, strict=True), "o-", color=KEPT)
    for states, milliseconds in times:
        place = (-4, -14) if states == times[0][0] else (6, -8)
        middle.annotate(f"{milliseconds:.1f}", (states, milliseconds), place, textcoords="offset points", fontsize=8)
    middle.set(ylim=(0, 22), xlim=(0, 280), xlabel="states")
    middle.set_title("ms per training step, sequential MNIST", fontsize=10)

    names = list(ACCURACY)
    right.scatter(ACCURACY.values(), names, s=60, color=["#8a8f98", KEPT, CUT, CUT])
    for name, value in ACCURACY.items():
        right.annotate(f"{value:.1f}", (value, name), (0, 7), textcoords="offset points", fontsize=8, ha="center")
    right.set(xlim=(79, 96), ylim=(len(names) - 0.5, -0.5))
    right.grid(axis="y", alpha=0.3)
    right.set_title("test accuracy in %, sequential MNIST", fontsize=10)
    figure.savefig(HERE / f"overview-{shape}{theme}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    for theme in INK:
        for shape in SHAPES:
            draw(Path(sys.argv[1]), theme, shape)
