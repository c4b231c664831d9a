"""``compressm`` and ``python -m compressm``: the command, and what it says where its extra is not installed."""

from __future__ import annotations

import sys

from compressm.errors import CompressmError, DependencyError, needs_extra


def main() -> None:
    """Entry point: every CompressmError becomes one sentence and exit code 2, that of wrong options."""
    try:
        with needs_extra("the command"):
            from compressm.cli import app

            app()
    except CompressmError as error:
        if isinstance(error, DependencyError) and sys.argv[1:] == ["doctor"]:  # which says so itself, and more
            from compressm.doctor import diagnose

            print(diagnose())
            return
        print(f"compressm: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
