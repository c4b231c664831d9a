"""calibration=the loader of training: the epoch under way, its samplers, workers and generators know nothing of it."""

from __future__ import annotations

import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

import compressm
from compressm.compression.planning.batches import take
from compressm.compression.planning.loaders import at_rest
from compressm.errors import DataError
from compressm.layers import LRU


def row(i: float):
    return torch.full((9, 4), i / 20), torch.tensor(i)


class Numbers(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return row(float(i))


class Augmented(Numbers):
    """Draws from generators of its own, and counts."""

    def __init__(self):
        self.numpy, self.old, self.python = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)
        self.torch, self.calls, self.log, self.cache = torch.Generator().manual_seed(0), 0, [], {}

    def __getitem__(self, i):
        self.calls += 1
        self.log.append(i)
        self.cache[i] = True
        noise = self.numpy.random() + self.old.rand() + self.python.random() + torch.rand((), generator=self.torch).item()
        return row(i + noise + self.calls + len(self.log) + len(self.cache))


class Stream(IterableDataset):
    """Goes on where it was, whoever asks."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < 20:
            self.position += 1
            yield row(float(self.position))
        self.position = 0


class Shuffled(Sampler):
    """Shuffles one array in place, anew with every epoch."""

    def __init__(self):
        self.order, self.epoch = np.arange(20), 0

    def __iter__(self):
        self.epoch += 1
        np.random.default_rng(self.epoch).shuffle(self.order)
        for place in range(20):
            yield int(self.order[place])

    def __len__(self):
        return 20


class Resumable(Sampler):
    """Remembers how far it is, as samplers with a state_dict do."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        self.given = 0
        while self.given < 20:
            self.given += 1
            yield self.given - 1

    def __len__(self):
        return 20


class Moving:
    """A loader around a loader, as there are for devices."""

    def __init__(self, loader):
        self.loader, self.epochs = loader, 0

    def __iter__(self):
        self.epochs += 1
        for x, y in self.loader:
            yield x + 0, y


def collated(rng, items):
    return torch.stack([x for x, _ in items]) + rng.random(), torch.stack([y for _, y in items]) + rng.random()


def generator():
    return torch.Generator().manual_seed(5)


LOADERS = {
    "plain": lambda: DataLoader(Numbers(), batch_size=2),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=2, shuffle=True),
    "own generator": lambda: DataLoader(Numbers(), batch_size=2, shuffle=True, generator=generator()),
    "sampler's generator": lambda: DataLoader(Numbers(), 2, sampler=RandomSampler(range(20), generator=generator())),
    "weighted": lambda: DataLoader(
        Numbers(), batch_size=2, sampler=WeightedRandomSampler(torch.ones(20), 20, generator=generator())
    ),
    "distributed": lambda: DataLoader(Numbers(), batch_size=2, sampler=DistributedSampler(Numbers(), 1, 0)),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(Shuffled(), 2, drop_last=False)),
    "in place": lambda: DataLoader(Numbers(), batch_size=2, sampler=Shuffled()),
    "resumable": lambda: DataLoader(Numbers(), batch_size=2, sampler=Resumable()),
    "augmented": lambda: DataLoader(Augmented(), batch_size=2, shuffle=True),
    "collated": lambda: DataLoader(Numbers(), batch_size=2, collate_fn=partial(collated, np.random.default_rng(3))),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "wrapped": lambda: Moving(DataLoader(Augmented(), batch_size=2, sampler=Shuffled())),
    "persistent": lambda: DataLoader(
        Numbers(), batch_size=2, shuffle=True, generator=generator(), num_workers=1, persistent_workers=True
    ),
    "persistent, wrapped": lambda: Moving(DataLoader(Stream(), batch_size=2, num_workers=1, persistent_workers=True)),
}


def epochs(loader, at=()):
    """What two epochs of training give, with reductions at some steps; and the states after each step."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = nn.Sequential(LRU(4, 8), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    calibration = loader if at else None
    schedule = compressm.At(list(at) or [5])
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.Shrink(0.3), schedule=schedule, calibration=calibration, sequences=5
    )
    seen = []
    for _ in range(2):
        for x, y in loader:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            report = compressor.step()
            assert not at or (report is not None) == (compressor.step_count in at)
            assert report is None or not at or report.layers[0].gramians == "data"
            seen.append((y.tolist(), torch.rand(()).item(), random.random(), np.random.rand()))  # noqa: NPY002
    return seen


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_goes_on_as_without_reductions(kind):
    expected = epochs(LOADERS[kind]())
    assert len(expected) == 20
    assert epochs(LOADERS[kind](), at=(5, 9, 13)) == expected


def test_an_error_puts_everything_back_as_well():
    loader = LOADERS["wrapped"]()
    inner = loader.loader
    before = dict(vars(inner)), loader.epochs, inner.dataset.calls, inner.sampler.epoch
    state = inner.dataset.torch.get_state()

    def fail():
        with at_rest(loader):
            take(loader, 5)
            assert inner.dataset.calls > before[2]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (dict(vars(inner)), loader.epochs, inner.dataset.calls, inner.sampler.epoch) == before
    assert torch.equal(inner.dataset.torch.get_state(), state)
    assert inner.dataset.log == []


def test_big_data_are_not_copied():
    class Big(Numbers):
        def __init__(self):
            self.data, self.names = torch.zeros(1 << 20), list(range(5000))

        def __deepcopy__(self, memo):
            raise AssertionError("the dataset was copied")

    dataset = Big()

    class Own(RandomSampler):
        def __init__(self, source):
            super().__init__(source)
            self.own = source

    loader = DataLoader(dataset, batch_size=2, sampler=Own(dataset))
    with at_rest(loader):
        assert loader.sampler.own is dataset
        take(loader, 5)


def test_a_sampler_that_cannot_be_copied_is_refused():
    class Locked(Resumable):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    loader = DataLoader(Numbers(), batch_size=2, sampler=Locked())
    model = nn.Sequential(LRU(4, 8), nn.Linear(4, 1))
    with pytest.raises(DataError, match=r"calibration: the BatchSampler of a DataLoader cannot be copied.*a list of"):
        compressm.compress(model, compressm.FixedRank(4), calibration=loader)
    assert isinstance(loader.sampler, Locked)
    assert model[0].d_state == 8


def test_an_iterator_goes_on():
    """What it gives is consumed, and kept for later reductions."""
    stream = iter(LOADERS["shuffled"]())
    model = nn.Sequential(LRU(4, 8), nn.Linear(4, 1))
    compressor = compressm.Compressor(
        model, None, policy=compressm.Shrink(0.3), schedule=compressm.At([1, 2]), calibration=stream, sequences=5
    )
    assert len(compressor.calibration.batches.seen) == 1
    spectra = [compressor.plan().layers[0].spectrum for _ in range(2)]
    assert spectra[0] == spectra[1]
    assert len(compressor.calibration.batches.seen) == 3
    assert len(list(stream)) == 7
