"""inspect(model): every layer's spectrum, what each tau would keep of it, and the error bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compressm.compression.common.models import compressible_layers, plain_model
from compressm.compression.common.workers import each
from compressm.compression.planning.plans import Calibration, Candidate, analyse
from compressm.compression.planning.policies import energy_order
from compressm.errors import needs_extra

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

TAUS = (0.01, 0.02, 0.04, 0.1)


@dataclass(frozen=True)
class SpectrumInspection:
    """One spectrum of one layer.

    Attributes:
        convention: ``"real"`` (2N real states), ``"complex"`` (N complex states), ``"selective"`` or ``"mean-LTI"``.
        gramians: ``"data"``, ``"data P, data-free Q"`` or ``"data-free"``.
        hsv: Hankel singular values, descending.
        ranks: per tau, the states that :class:`Energy` would keep (without gate and rounding).
        error_bounds: per tau, 2 * sum of the values cut, a bound on the H-infinity norm of the error; None with data
            Gramians, to which it does not apply.
    """

    convention: str
    gramians: str
    hsv: tuple[float, ...]
    ranks: dict[float, int]
    error_bounds: dict[float, float] | None


@dataclass(frozen=True)
class LayerInspection:
    """One layer.

    Attributes:
        name: module name.
        kind: class name.
        states: rank now.
        slowest: largest modulus of an eigenvalue.
        state_bytes: what the layer carries from one token to the next, per sequence, in bytes.
        spectra: with the data first, if there are some, then data-free: the default's, then the paper's.
        remark: what to expect of layers of this kind; empty where there is nothing to say.
    """

    name: str
    kind: str
    states: int
    slowest: float
    state_bytes: int
    spectra: tuple[SpectrumInspection, ...]
    remark: str = ""


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found; prints as a table (``print`` or rich)."""

    layers: tuple[LayerInspection, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; taus are strings."""
        data = asdict(self)
        for layer in data["layers"]:
            for spectrum in layer["spectra"]:
                spectrum["hsv"] = list(spectrum["hsv"])
                for key in ("ranks", "error_bounds"):
                    if spectrum[key] is not None:
                        spectrum[key] = {f"{tau:g}": value for tau, value in spectrum[key].items()}
            layer["spectra"] = list(layer["spectra"])
        return {"layers": list(data["layers"])}

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        caption = "max, min: Hankel singular values; tau: states kept if that share of their sum goes; bound: of the error"
        parts = [part for layer in self.layers for part in (_layer_table(layer), "")]
        return Group(*parts, Text(caption, style="dim italic"))

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        file = StringIO()
        Console(file=file, width=120, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def plot(self, path: str | Path) -> Path:
        """Draw every layer's spectra into one picture file (png, svg or pdf by suffix) and return its path.

        Raises:
            DependencyError: matplotlib is not installed.
            OSError: the file cannot be written.
        """
        with needs_extra("Inspection.plot"):
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

        columns = min(3, len(self.layers))
        rows = math.ceil(len(self.layers) / columns)
        figure = Figure(figsize=(4.8 * columns, 3.4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, layer in zip(axes.flat, self.layers, strict=False):
            _draw(axis, layer)
        for axis in axes.flat[len(self.layers) :]:
            axis.set_visible(False)
        axes.flat[0].legend(fontsize=8)
        path = Path(path)
        figure.savefig(path)
        return path


def inspect(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    sequences: int = 64,
) -> Inspection:
    """Look at every layer's spectra; changes nothing.

    Args:
        model: a plain module with state-space layers.
        calibration, forward, sequences: as for ``Compressor``; with calibration the data spectrum is shown as well.

    Raises:
        ModelError: no such layer, or an unsupported one.
        NumericalError: a layer is not finite or not stable.
    """
    model = plain_model(model)
    layers = {name: (module, adapter.in_form(module, None)) for name, (module, adapter) in compressible_layers(model).items()}
    runs = []
    for convention in ("real", "complex"):
        known = {name: layer for name, layer in layers.items() if convention in layer[1].conventions}
        runs.append(analyse(model, known, convention, Calibration()))
    if calibration is not None:
        runs.insert(0, analyse(model, layers, "real", Calibration(calibration, forward, sequences)))
    inspected = each(lambda name, _: tuple(_spectrum(run[name]) for run in runs if name in run), layers)
    found = []
    for name, (module, adapter) in layers.items():
        rank = adapter.rank(module)
        size = adapter.state_bytes(module, rank)
        slowest, remark = adapter.slowest(module), adapter.remark(module)
        found.append(LayerInspection(name, type(module).__name__, rank, slowest, size, inspected[name], remark))
    return Inspection(tuple(found))


def _spectrum(candidate: Candidate) -> SpectrumInspection:
    hsv, convention = candidate.analysis.hsv, candidate.analysis.convention
    ranks, bounds = {}, {}
    degenerate = not bool((hsv > 0).any())
    for tau in TAUS:
        order = len(hsv) if degenerate else energy_order(hsv, tau)
        ranks[tau] = candidate.analysis.modes(order)
        bounds[tau] = 2 * float(hsv[order:].sum())
    known = bounds if candidate.analysis.bounded else None
    return SpectrumInspection(convention, candidate.analysis.gramians, tuple(hsv.tolist()), ranks, known)


def _layer_table(layer: LayerInspection) -> Table:
    """One layer in 80 columns: a line for every spectrum."""
    from rich.table import Table

    size = f"{layer.states} states, {layer.state_bytes:,} bytes a sequence"
    title = f"[bold]{layer.name or '(model)'}[/] ({layer.kind}): {size}, |lambda| up to {layer.slowest:.6f}"
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, expand=False)
    table.add_column("spectrum", min_width=19)
    taus = [f"{tau:g}".removeprefix("0") for tau in TAUS]
    for heading in ("max", "min", *(f"tau {tau}" for tau in taus), f"bound {taus[1]}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for spectrum in layer.spectra:
        table.add_row(
            f"{spectrum.convention}, {spectrum.gramians}",
            f"{spectrum.hsv[0]:.3g}",
            f"{spectrum.hsv[-1]:.3g}",
            *(str(spectrum.ranks[tau]) for tau in TAUS),
            "-" if spectrum.error_bounds is None else f"{spectrum.error_bounds[TAUS[1]]:.3g}",
        )
    if layer.remark:
        table.caption, table.caption_justify, table.caption_style = layer.remark, "left", "dim italic"
    return table


def _draw(axis, layer: LayerInspection) -> None:
    for spectrum in layer.spectra:
        top = max(spectrum.hsv[0], 1e-300)
        values = [max(value / top, 1e-18) for value in spectrum.hsv]
        states = [(i + 1) * layer.states / len(values) for i in range(len(values))]
        (line,) = axis.semilogy(states, values, label=f"{spectrum.convention}, {spectrum.gramians}")
        axis.axvline(spectrum.ranks[TAUS[1]], color=line.get_color(), linestyle=":", linewidth=1)
    axis.set_title(f"{layer.name or layer.kind}: {layer.states} states", fontsize=9)
    axis.set_xlabel("states kept (dotted: tau 0.02)", fontsize=8)
    axis.set_ylabel("sigma / sigma max", fontsize=8)
    axis.grid(alpha=0.3)
