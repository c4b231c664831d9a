"""Where the files of a dataset come from: a folder of the user's, or a download."""

from __future__ import annotations

from pathlib import Path

from compressm.errors import DataError


def require_folder(folder: Path | None) -> None:
    """Raise DataError if a folder is given that does not exist."""
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"--data-dir {folder}: no such folder, expected one with the dataset's files. Omit it to download them")


def fetch(url: str, file: str, sha256: str, folder: str) -> Path:
    """A file of the internet, downloaded once: checked by SHA-256, kept in the user's cache.

    Raises:
        DataError: it cannot be had.
    """
    import pooch

    try:
        return Path(pooch.retrieve(url + file, f"sha256:{sha256}", fname=file, path=pooch.os_cache("compressm") / folder))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{url}{file}: download failed ({error}). Nothing incomplete was kept: try again, or pass --data-dir with the files"
        ) from error
