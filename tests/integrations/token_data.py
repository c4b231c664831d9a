"""Sequences of tokens to train on."""

from __future__ import annotations

import torch

VOCABULARY, LENGTH = 23, 12


def tokens(count=3, seed=0):
    return torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class Tokens(torch.utils.data.Dataset):
    """Sequences drawn at random."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = tokens(1, seed=index)[0]
        return {"input_ids": row, "labels": row}


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards, so that there is something to learn."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        ids = 3 + (index + torch.arange(LENGTH)) % (VOCABULARY - 3)
        return {"input_ids": ids, "labels": ids}


def counted():
    return [{"input_ids": torch.stack([Counting()[i]["input_ids"] for i in range(8)])}]
