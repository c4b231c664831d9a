"""The ``compressm`` command."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import compressm
from compressm._version import __version__
from compressm.benchmarking.request import SIZES, Request, names_of_ops, other_sizes, sizes_of_ops
from compressm.errors import ConfigError
from compressm.experiments.tasks.presets import PRESETS
from compressm.inputs import (
    check_checkpoint,
    check_counts,
    check_device,
    check_installed,
    check_model_folder,
    check_new_folder,
    check_there,
    check_writable,
    report_file,
    require_folder,
)

app = typer.Typer(
    name="compressm",
    help="State-space models that grow smaller and faster while they train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

KERNELS = Path(__file__).parent / "kernels"
BENCH_OPS = (*names_of_ops(KERNELS), *SIZES)  # all that can be measured, before torch is here
Preset = Annotated[str, typer.Argument(help="One of: " + ", ".join(PRESETS), show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="Output folder of compressm train.", show_default=False)]


@app.command()
def train(
    preset: Preset,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data; without it: a download, or Python's own library for stdlib-lm.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of every run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of parameters, order of the data and dropout.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder.  [default: runs/PRESET]", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what was interrupted in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew over an unfinished command.")] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as model=mamba2; may be repeated."),
    ] = None,
) -> None:
    """Train, shrink in training, and compare with full size and with small from scratch."""
    from compressm.experiments.declared import check, check_batch_size, check_unfinished, parse_assignments

    options = {"steps": steps, "batch_size": batch_size, "seed": seed, "device": device}
    overrides = {key: value for key, value in options.items() if value is not None}
    for key, value in parse_assignments(assignments or []).items():
        if key in overrides:
            raise ConfigError(f"--set {key}: given twice, also as an option of its own")
        overrides[key] = value
    check(preset, overrides)
    check_device(str(overrides.get("device", "cpu")))
    require_folder(data_dir)
    if data_dir is None:
        check_batch_size(preset, overrides)
    out = Path("runs") / preset if out is None else out
    check_writable("--out", out)
    if not (resume or overwrite):
        check_unfinished(out)
    from compressm.experiments import runs
    from compressm.experiments.display import TrainingDisplay
    from compressm.experiments.reports.summary import headline, summary_table
    from compressm.experiments.tasks.objectives import OBJECTIVES

    folder = None if data_dir is None else str(data_dir.resolve())
    console = Console()
    command = runs.prepare(preset, overrides, out, folder, resume=resume, overwrite=overwrite)
    if resume and not command.resume:
        console.print(f"nothing to resume in {out}, starting anew", highlight=False)
    metric = OBJECTIVES[command.settings.objective].metric
    with _stop_on_signal() as stopped, TrainingDisplay(console, len(command.settings.runs), metric) as display:
        try:
            report = runs.execute(command, out, display, lambda: bool(stopped))
        except runs.Interrupted as interruption:
            console.print(f"{interruption}; everything is saved.  Continue with: {_resume_line(preset, out)}", highlight=False)
            raise typer.Exit(128 + stopped[0]) from None
    console.print(summary_table(report))
    console.print(headline(report), highlight=False)
    console.print(f"report: {out / runs.PAGE_FILE}  numbers: {out / runs.REPORT_FILE}", highlight=False)


@app.command()
def compare(
    task: Preset,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated; the first is compared with all others.  [default: the task's]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method, paired by their seeds.")] = 5,
    tune: Annotated[
        str | None, typer.Option(metavar="lr=1,2,3", help="Multiples of the learning rate, tried on other seeds and data.")
    ] = None,
    tune_seeds: Annotated[int, typer.Option(help="Runs of each multiple.")] = 2,
    budget: Annotated[str | None, typer.Option(help="Stop after this time, such as 30m, and report on what is done.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    quality: Annotated[
        float | None, typer.Option(help="Count steps and time until the metric has this value.  [default: the median method's]")
    ] = None,
    all_pairs: Annotated[bool, typer.Option("--all-pairs", help="Compare every method with every other.")] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the data, as for train.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; its runs are kept.  [default: runs/compare-TASK]", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; may be repeated.")
    ] = None,
) -> None:
    """Compare methods over several seeds, their learning rates tuned apart, with statistics."""
    from compressm.experiments import declared
    from compressm.experiments.declared import check, parse_assignments

    overrides = parse_assignments(assignments or [])
    chosen = None if methods is None else [name.strip() for name in methods.split(",")]
    check(task, overrides if chosen is None else {**overrides, "runs": chosen})
    check_device(str(overrides.get("device", "cpu")))
    require_folder(data_dir)
    if data_dir is None:
        declared.check_batch_size(task, overrides)
    multiples = () if tune is None else declared.parse_tune(tune)
    declared.check_counts(seeds, tune_seeds, multiples)
    seconds = None if budget is None else declared.parse_budget(budget)
    out = Path("runs") / f"compare-{task}" if out is None else out
    check_writable("--out", out)
    from compressm.experiments import comparing

    design = comparing.plan(
        task,
        overrides,
        chosen,
        seeds=seeds,
        multiples=multiples,
        tuning_seeds=tune_seeds,
        data_dir=None if data_dir is None else str(data_dir.resolve()),
    )
    console = Console()
    with _stop_on_signal() as stopped:
        found = comparing.run(
            design, out, console, lambda: bool(stopped), workers=jobs, budget=seconds, quality=quality, all_pairs=all_pairs
        )
    if stopped:
        console.print("stopped; everything is saved.  The same command goes on.", highlight=False)
        raise typer.Exit(128 + stopped[0])
    if found is None:
        console.print("no run is done that can be reported on.  The same command goes on.", highlight=False)
        raise typer.Exit(1)
    console.print(comparing.tables(found))
    console.print(f"page: {out / comparing.PAGE_FILE}  numbers: {out / comparing.RESULT_FILE}", highlight=False)


@app.command()
def report(folder: RunFolder) -> None:
    """Print the table of a finished command again, and draw its report.html anew."""
    check_installed(("matplotlib", "jinja2"))
    report_file(folder)
    from compressm.experiments.reports.data import read_report
    from compressm.experiments.reports.html import write_html
    from compressm.experiments.reports.summary import headline, summary_table

    data = read_report(folder)
    console = Console()
    console.print(summary_table(data))
    console.print(headline(data), highlight=False)
    page = (folder if folder.is_dir() else folder.parent) / "report.html"
    write_html(data, page)
    console.print(f"report: {page}", highlight=False)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that compressm train wrote.", show_default=False)],
    data_dir: Annotated[Path | None, typer.Option(help="Also show the spectrum on data from this folder.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectra into this picture (png, svg, pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the Hankel spectra of a checkpoint's layers, and how many states each tau would keep."""
    check_checkpoint(checkpoint)
    require_folder(data_dir)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {plot}: expected a path ending in .png, .svg or .pdf")
    from compressm.experiments.restoring import restore_model

    model, calibration = restore_model(checkpoint, data_dir)
    found = compressm.inspect(model, calibration)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        Console().print(found)
    if plot is not None:
        try:
            found.plot(plot)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--plot {plot}: {error}. Expected a writable path ending in .png, .svg or .pdf") from error


@app.command()
def compress(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that transformers' save_pretrained wrote.", show_default=False)],
    states: Annotated[int, typer.Option(help="States that every layer keeps.", show_default=False)],
    data: Annotated[
        list[Path], typer.Option(help="Text, folder of texts, or token ids (.npy, .json); may be repeated.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the result, new or empty.", show_default=False)],
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    held_out: Annotated[int, typer.Option(help="Further sequences, on which the loss is measured.")] = 16,
    multiple_of: Annotated[int | None, typer.Option(help="Demanded of the states; 1 if CUDA kernels do not matter.")] = None,
    refine: Annotated[int | None, typer.Option(help="Steps of distillation per layer.  [default: 200 where known]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Give a trained language model of transformers fewer states: calibrate, cut, distil, store."""
    check_counts(states, sequences, length, held_out, multiple_of)
    check_device(device)
    check_model_folder(checkpoint)
    check_new_folder(out)
    check_writable("--out", out)
    check_there(data)
    from compressm.experiments.training import pick_device
    from compressm.integrations.post_training import compress_checkpoint

    numbers: dict[str, Any] = {"states": states, "sequences": sequences, "length": length, "held_out": held_out}
    options: dict[str, Any] = {"multiple_of": multiple_of, "refine": refine, "device": pick_device(device)}
    outcome = compress_checkpoint(checkpoint, out, data, **numbers, **options)
    if as_json:
        print(json.dumps(outcome.to_dict()))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, before, after in outcome.rows():
        table.add_row(name, before, after)
    console = Console()
    console.print(table)
    console.print(f"{outcome.seconds:.1f} s, stored in {out}", highlight=False)


@app.command()
def bench(
    op: Annotated[str, typer.Argument(help="What: " + ", ".join(BENCH_OPS), show_default=False)],
    batch: Annotated[int | None, typer.Option(help="Sequences.")] = None,
    d_model: Annotated[int | None, typer.Option(help="Channels.")] = None,
    length: Annotated[int | None, typer.Option(help="Steps of a sequence.")] = None,
    states: Annotated[str | None, typer.Option(help="Numbers of states to compare, such as 128,12.")] = None,
    width: Annotated[int | None, typer.Option(help="Taps of a convolution.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Blocks of a training step's model.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of an attempt, a rollback or a wait.")] = None,
    rank: Annotated[int | None, typer.Option(help="States that balanced_truncation leaves.")] = None,
    size: Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Any other size; may be repeated.")] = None,
    passes: Annotated[str | None, typer.Option("--pass", help="forward or forward+backward.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    rounds: Annotated[int | None, typer.Option(help="Samples of each; without it about a second's worth.")] = None,
    with_compile: Annotated[bool, typer.Option("--compile", help="Also time torch.compile (minutes to compile).")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures into this file.")] = None,
) -> None:
    """Time an op, a layer or a training step at your own sizes, beside plain torch and the machine's limit."""
    given = {"batch": batch, "channels": d_model, "length": length, "width": width}
    given |= {"blocks": blocks, "layers": layers, "rank": rank}
    sizes = {name: number for name, number in given.items() if number is not None} | other_sizes(size or [])
    request = Request(op, sizes, states, passes, dtype, device, rounds, with_compile)
    request.check({**sizes_of_ops(KERNELS), **SIZES})
    if json_file is not None:
        check_writable("--json", json_file, file=True)
    from compressm.benchmarking import command

    console = Console()
    try:
        with console.status("", spinner="line") as status:
            run = command.run(request, status.update)
    except KeyboardInterrupt:
        console.print("stopped, nothing was written")
        raise typer.Exit(128 + signal.SIGINT) from None
    if run.results:
        console.print(command.table(run))
        console.print(command.ceilings_line(run), highlight=False)
    for missing in (*run.skipped, *run.failed):
        console.print(f"{missing.group}, {missing.contender}: {missing.reason}", highlight=False, markup=False)
    if json_file is not None:
        run.save(json_file)
    if run.failed:
        raise typer.Exit(1)


@app.command()
def doctor(
    build: Annotated[bool, typer.Option("--build", help="Build the C++ kernels now, if they are not.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has, what therefore runs where, and what is missing."""
    from compressm.doctor import diagnose

    found = diagnose(build=build)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        Console().print(found)


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"compressm {__version__}")
        raise typer.Exit()


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGINT or SIGTERM; a second one ends the process at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        for each in previous:
            signal.signal(each, signal.SIG_DFL)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _resume_line(preset: str, out: Path) -> str:
    default = out == Path("runs") / preset
    return f"compressm train {preset} --resume" + ("" if default else f" --out {out}")
