"""``compressm`` and ``python -m compressm``: the command, and what it says where its extra is not installed."""

from __future__ import annotations

import sys

from compressm.errors import CompressmError, needs_extra


def main() -> None:
    """Entry point: every CompressmError becomes one sentence and exit code 1."""
    try:
        with needs_extra("the command"):
            from compressm.cli import app

            app()
    except CompressmError as error:
        print(f"compressm: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
