"""Token sequences out of files: texts by a tokenizer, or ids as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressm.errors import DataError

IDS = (".npy", ".json")
CHARACTERS = 16  # read of a text for every token that is wanted


def token_sequences(paths: Sequence[Path], tokenizer: Any, vocabulary: int, count: int, length: int) -> Tensor:
    """The first ``count`` pieces (count, length) of all files one behind the other, int64.

    Args:
        paths: files, and folders, whose files are taken in the order of their names, hidden ones left out.
        tokenizer: of transformers; None: all files hold ids, ``.npy`` or ``.json``, in one row or several.  With a tokenizer
            ``.npy`` files alone are ids.
        vocabulary: ids are below.

    Raises:
        DataError: a file is missing or holds something else, or there are too few tokens.
    """
    wanted, found, have = count * length, list[np.ndarray](), 0
    for path in _files(paths):
        if path.suffix == ".npy" or (tokenizer is None and path.suffix in IDS):
            tokens = _ids(path)
        elif tokenizer is None:
            raise DataError(
                f"--data {path}: is a text, and the checkpoint has no tokenizer, expected token ids in .npy or .json files. "
                "Store the model's tokenizer beside it (tokenizer.save_pretrained), or the tokens of the text"
            )
        else:
            tokens = np.array(tokenizer(_text(path, CHARACTERS * wanted), add_special_tokens=False)["input_ids"], np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise DataError(f"--data {path}: ids from {tokens.min()} to {tokens.max()}, expected 0 to {vocabulary - 1}")
        found.append(tokens)
        have += len(tokens)
        if have >= wanted:
            break
    if have < wanted:
        raise DataError(
            f"--data: {have} tokens, expected at least {wanted} for {count} sequences of {length}. Give more text, or ask for "
            "fewer or shorter sequences"
        )
    return torch.from_numpy(np.concatenate(found)[:wanted]).view(count, length)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            names = (file.relative_to(path).parts for file in path.rglob("*") if file.is_file())
            yield from (path.joinpath(*parts) for parts in sorted(names) if not any(part.startswith(".") for part in parts))
        elif path.is_file():
            yield path
        else:
            raise DataError(f"--data {path}: no such file or folder")


def _text(path: Path, characters: int) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(characters)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path}: cannot be read as text ({error}), expected UTF-8") from error


def _ids(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            ids = np.load(path, allow_pickle=False)
        else:
            rows = json.loads(path.read_text(encoding="utf-8"))
            rows = [rows] if isinstance(rows, list) and not any(isinstance(row, list) for row in rows) else rows
            ids = np.concatenate([np.array(row) for row in rows]) if rows else np.array([], np.int64)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"--data {path}: cannot be read as token ids ({error})") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"--data {path}: holds {ids.dtype}, expected whole numbers, the ids of tokens")
    return ids.reshape(-1).astype(np.int64)
