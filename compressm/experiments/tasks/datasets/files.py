"""Where the files of a dataset come from: a folder of the user's, or a download."""

from __future__ import annotations

from pathlib import Path

from compressm.errors import DataError


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
