"""One session on a GPU: are all Triton kernels right, how fast are they, which configurations should the plan choose.

    PYTHONPATH=. python benchmarks/gpu_session.py --out OUT [--part kernels] [--budget 520] [--build-mamba DIR]

It needs torch, triton, numpy and pytest, no network and no installation.  Every part (kernels, layers, train) writes
OUT/PART.json as it goes; a part that is complete there is not run again unless --again is given.  The last lines are a short
table.  The exit code is 1 where a check failed.

Without a GPU, ``--device cpu --smoke`` runs the whole program on tiny shapes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

PARTS = ("kernels", "layers", "train")
LINES = 58  # of the last table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given several times; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=520.0, metavar="SECONDS", help="for the whole run")
    parser.add_argument("--again", action="store_true", help="run parts that are complete, too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and one round, to try the program itself")
    parser.add_argument("--build-mamba", type=Path, metavar="DIR", help="source of mamba_ssm, to be compiled as a peer")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(1, root)
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False. Try the program with --device cpu --smoke", file=sys.stderr)
        return 2
    if arguments.work:
        from gpu import work

        work.main(arguments.work, arguments.device, arguments.smoke, arguments.out)
        return 0
    return session(arguments)


def session(arguments: argparse.Namespace) -> int:
    """Run the parts and print the table."""
    from gpu import part_kernels, part_layers, part_train
    from gpu.session import Session, read

    modules = {"kernels": part_kernels, "layers": part_layers, "train": part_train}
    mamba = arguments.build_mamba.resolve() if arguments.build_mamba else None
    parts = arguments.part or PARTS
    current = Session(arguments.out.resolve(), arguments.device, arguments.smoke, arguments.budget, mamba, parts[-1])
    current.out.mkdir(parents=True, exist_ok=True)
    lines, failures = [], []
    for name in parts:
        body = read(current.out / f"{name}.json")
        if arguments.again or not (body and body["complete"] and body["smoke"] == arguments.smoke):
            print(f"{name}: {current.left():.0f} s left", flush=True)
            body = modules[name].run(current).body
        failures += body["failed"]
        late = sum(entry["for_time"] for entry in body["skipped"])
        lines += [f"== {name}: {len(body['failed'])} failed, {late} cut for time, {len(body['skipped']) - late} not possible"]
        lines += modules[name].summary(body)
    lines += [f"FAILED {entry['what']}: {entry['why'].splitlines()[-1][:200]}" for entry in failures[:10]]
    print("\n".join(line[:200] for line in shortened(lines)))
    return 1 if failures else 0


def shortened(lines: list[str]) -> list[str]:
    """At most LINES of them: headings, failures, and as many of the rest as fit."""
    spare = LINES - 1 - sum(line.startswith(("==", "FAILED")) for line in lines)
    kept, left_out = [], 0
    for line in lines:
        if not line.startswith(("==", "FAILED")):
            spare -= 1
            if spare < 0:
                left_out += 1
                continue
        kept.append(line)
    return kept + ([f"... and {left_out} more lines in the JSON files"] if left_out else [])


if __name__ == "__main__":
    sys.exit(main())
