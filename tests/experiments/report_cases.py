"""Reports to test with, and how pages and tables are read back."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

from rich.console import Console

from compressm.compression.planning.report import LayerReduction, ReductionReport
from compressm.experiments.reports.html import write_html
from compressm.experiments.reports.summary import summary_table

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


def image_report():
    """The report.json of a command with all four runs on images."""
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


class _Barriers(HTMLParser):
    """What keeps people from a page who do not see it, or see it badly."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.headings = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "html" and not attrs.get("lang"):
            self.found.append("no language")
        if tag == "th" and attrs.get("scope") not in ("row", "col"):
            self.found.append("a heading of a table without its scope")
        named = any(role == "img" and label for role, label in self.open)
        if tag == "svg" and not (named and attrs.get("aria-hidden") == "true"):
            self.found.append("a picture without a name")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append((attrs.get("role"), attrs.get("aria-label")))

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        self.open.pop()


def barriers(text):
    """The barriers of a page: names of things, order of headings, contrast of the colours that it declares."""
    found = _Barriers(text)
    deep = [after for before, after in pairwise([0, *found.headings]) if after > before + 1]
    found.found += [f"a heading of level {level} too deep" for level in deep]
    if found.headings.count(1) != 1 or not re.search("<title>[^<]+</title>", text):
        found.found.append("no title, or several")
    roots = re.findall(r":root {(.*?)}", text, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", root)) for root in roots)
    for theme in (light, dark):
        assert theme.keys() == light.keys() > {"page", "panel", "ink", "soft", "line"}
        for ground in ("page", "panel"):
            for name in theme.keys() - {"page", "panel", "line"}:
                least = 4.5 if name in ("ink", "soft") else 3.0  # text, and lines and points of pictures
                if _contrast(theme[name], theme[ground]) < least:
                    found.found.append(f"{name} {theme[name]} on {ground} {theme[ground]}")
    return found.found


def _contrast(one, other):
    """Of two colours, after the Web Content Accessibility Guidelines 2.2."""
    lightness = []
    for colour in (one, other):
        parts = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lightness.append(0.05 + 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return max(lightness) / min(lightness)


def printed(data, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(summary_table(data))
    return console.file.getvalue()


def text_report():
    """The report.json of a command on text, judged by bits per byte: compressed between full size and small."""
    data = image_report()
    data |= {"preset": "stdlib-lm", "title": "Next byte", "metric": "bits_per_byte", "notes": ["A note."]}
    data["runs"] = data["runs"][:3]
    data["config"] = {"rank": 14, "length": 256, "runs": ["compressed", "full", "small"]}
    data["dataset"] = {"name": "standard library", "train": 1000, "validation": 500, "test": 600}
    for entry, bits in zip(data["runs"], (1.931, 1.92, 2.05), strict=True):
        final, nats = entry["final"], bits * math.log(2)
        del final["accuracy"]
        windows = [bits + 0.3 * math.sin(number) + 0.01 * math.cos(bits * number) for number in range(40)]
        final |= {"bits_per_byte": bits, "loss": nats, "perplexity": math.exp(nats), "window_bits": windows}
        for evaluation in entry["evaluations"]:
            accuracy = evaluation.pop("accuracy")
            evaluation |= {"bits_per_byte": bits + 1 - accuracy, "perplexity": 4.0}
        for cut in entry["reductions"]:
            del cut["accuracy_before"], cut["accuracy_after"]
            cut |= {"bits_per_byte_before": 2.6123, "bits_per_byte_after": 2.6218}
            for part in cut["layers"]:
                values = SPECTRUM[:64]
                part |= {"convention": "selective", "spectrum": values, "spectrum_after": values[:14], "method": "subset"}
    data["timing"]["steps"] = data["timing"]["steps"][:3]
    return data
