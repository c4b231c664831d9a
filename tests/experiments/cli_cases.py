"""How tests call the command, and compare what it wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

import compressm
from compressm import cli


def run(*arguments):
    """The command in this process; errors propagate."""
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


def spawn(*arguments):
    command = [sys.executable, "-m", "compressm", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(compressm.__file__).parents[1]
    )


def timeless(tree):
    """A report without what depends on time and machine."""
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if not k.startswith("seconds") and k not in ("timing", "machine")}
    return [timeless(item) for item in tree] if isinstance(tree, list) else tree
