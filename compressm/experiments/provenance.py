"""With which versions a figure was made."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path

import compressm

RESULTS = "benchmarks/results"  # what a run itself changes in a checkout


@functools.cache
def commit() -> str:
    """Of the checkout that the package runs from, ending in ``-dirty`` where files differ; empty outside of one.

    As it was when this was first asked: what runs was imported before.
    """
    root = Path(compressm.__file__).parents[1]
    found = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", ".", f":!{RESULTS}")
    return found + ("-dirty" if found and changed else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=False).stdout.strip()
    except OSError:
        return ""


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed, by name."""
    found = {}
    for package in sorted(set(packages)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
