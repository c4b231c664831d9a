"""The handwritten digits that come with scikit-learn: 64 pixels each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from compressm.experiments.tasks.datasets.sequences import Sequences
from compressm.experiments.tasks.parts import Dataset
from compressm.inputs import require_folder


class Digits(Dataset):
    """1797 digits of 8 x 8 pixels, 16 shades of grey."""

    name = "digits"
    gives = Sequences
    model = "lru"
    objective = "classification"
    at_hand = True
    examples = 1347

    def load(self, folder: Path | None) -> Sequences:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        require_folder(folder)
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy((images * 15.9375).round().astype(np.uint8))[:, :, None]
        y = torch.from_numpy(labels.astype(np.int64))
        train, test = train_test_split(np.arange(len(y)), test_size=450, random_state=0, stratify=labels)
        return Sequences("handwritten digits (scikit-learn)", x[train], y[train], x[test], y[test], 10)
