"""Reading the data, and what damaged, missing or half-downloaded files are answered."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from compressm.errors import ConfigError, DataError
from compressm.experiments.settings import resolve
from compressm.experiments.tasks.batches import Batches
from compressm.experiments.tasks.datasets import DATASETS, cifar, mnist


def load(name: str, folder):
    return DATASETS[name](resolve(name, {})).load(folder)


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return gzip.compress(header + values.astype(np.uint8).tobytes(), mtime=0)


def mnist_files(train: int = 30, test: int = 12, size: int = 3) -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    parts = []
    for count in (train, test):
        parts += [draw.integers(0, 256, (count, size, size)), draw.integers(0, 10, count)]
    return {name: idx(part) for name, part in zip(mnist.MNIST_FILES, parts, strict=True)}


@pytest.fixture
def mnist_folder(tmp_path):
    for name, content in mnist_files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    data = load("digits", None)
    assert data.describe() == {
        "name": "handwritten digits (scikit-learn)", "train": 1347, "test": 450, "length": 64, "channels": 1, "classes": 10
    }  # fmt: skip
    images = {tuple(row) for row in load_digits().data.astype(int).tolist()}
    for x in (data.train_x, data.test_x):
        assert {tuple(row) for row in (x[:, :, 0].double() / 15.9375).round().int().tolist()} <= images
    assert torch.bincount(data.test_y).min() >= 43
    mean, std = data.statistics()
    torch.testing.assert_close(mean, data.train_x.float().mean((0, 1)), rtol=1e-5, atol=0)
    torch.testing.assert_close(std, data.train_x.float().std((0, 1), correction=0), rtol=1e-5, atol=0)


def test_mnist_pixels_and_labels(mnist_folder):
    data = load("smnist", mnist_folder)
    assert data.train_x.shape == (30, 9, 1) and data.test_x.shape == (12, 9, 1)  # noqa: PT018
    raw = gzip.decompress((mnist_folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert bytes(data.train_x.flatten().tolist()) == raw[16:]
    labels = gzip.decompress((mnist_folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert bytes(data.test_y.tolist()) == labels[8:]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no such folder.*Omit it to download"):
        load("smnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: no such file, expected the official"):
        load("smnist", tmp_path)
    with pytest.raises(DataError, match=r"data_batch_1\.bin: No such file.*cifar10-jpeg\.npz"):
        load("scifar", tmp_path)


@pytest.mark.parametrize("name", list(mnist.MNIST_FILES))
def test_truncated_files_are_refused_wherever_they_end(mnist_folder, name):
    whole = (mnist_folder / name).read_bytes()
    for end in (0, 1, 9, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        (mnist_folder / name).write_bytes(whole[:end])
        with pytest.raises(DataError, match=name):
            load("smnist", mnist_folder)


def test_files_that_are_something_else(mnist_folder):
    target = mnist_folder / "train-labels-idx1-ubyte.gz"
    for content in (b"<html>not found</html>", gzip.compress(b"hello"), idx(np.zeros((2, 2))), idx(np.zeros(29))):
        target.write_bytes(content)
        with pytest.raises(DataError, match="train"):
            load("smnist", mnist_folder)
    image = gzip.decompress((mnist_folder / "train-images-idx3-ubyte.gz").read_bytes())
    (mnist_folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(image + b"\0"))
    with pytest.raises(DataError, match="not an IDX file"):
        load("smnist", mnist_folder)


def test_cifar_from_both_formats(tmp_path):
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1], np.uint8)
    rows = np.concatenate([labels[:, None], pixels.reshape(4, -1)], 1).tobytes()
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    for name in (*cifar.CIFAR_TRAIN, "test_batch.bin"):
        (inner / name).write_bytes(rows)
    data = load("scifar", tmp_path)
    assert data.train_x.shape == (20, 1024, 3)
    assert data.test_x[2].reshape(32, 32, 3).permute(2, 0, 1).tolist() == pixels[2].tolist()
    assert data.test_y.tolist() == [3, 1, 4, 1]
    (inner / "data_batch_4.bin").write_bytes(rows[:-1])
    with pytest.raises(DataError, match=r"data_batch_4\.bin: 12291 bytes"):
        load("scifar", tmp_path)

    encoded = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG")
        encoded.append(stream.getvalue())
    packed = {"class_names": np.array(["a"])}
    for split in ("train", "test"):
        packed[f"{split}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
        packed[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
        packed[f"{split}_labels"] = labels
    np.savez(tmp_path / "cifar10-jpeg.npz", **packed)
    data = load("scifar", tmp_path)
    assert data.name.endswith("(lossy JPEG copy)")
    decoded = np.asarray(Image.open(io.BytesIO(encoded[1])))
    assert data.train_x[1].reshape(32, 32, 3).tolist() == decoded.tolist()
    content = (tmp_path / "cifar10-jpeg.npz").read_bytes()
    (tmp_path / "cifar10-jpeg.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cifar10-jpeg\.npz: damaged"):
        load("scifar", tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A download server on loopback; ``broken`` holds the names whose transfer breaks off half-way."""
    files, broken, served = mnist_files(), set(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            served.append(name)
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(files[name][: len(files[name]) // 2] if name in broken else files[name])

        def log_message(self, *details):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(mnist, "MNIST_FILES", digests)
    monkeypatch.setattr(mnist, "MNIST_URL", f"http://127.0.0.1:{listening.server_port}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield broken, served, files
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_download_once_and_survive_an_interrupted_one(server, tmp_path):
    broken, served, _files = server
    broken.add("t10k-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: download failed.*--data-dir"):
        load("smnist", None)
    assert not list(tmp_path.rglob("t10k-images*"))
    broken.clear()
    assert len(load("smnist", None).train_y) == 30
    count = len(served)
    load("smnist", None)
    assert len(served) == count


def test_a_download_with_other_content_is_refused(server):
    _, _, files = server
    files["train-labels-idx1-ubyte.gz"] = idx(np.zeros(30))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz: download failed"):
        load("smnist", None)


def test_batches_depend_on_seed_and_step_alone():
    x, y = torch.arange(23)[:, None, None], torch.arange(23)
    batches = Batches(x, y, 5, seed=3)
    first = [batches[step][1].tolist() for step in range(9)]
    again = Batches(x, y, 5, seed=3)
    assert again[7][1].tolist() == first[7]
    assert again[2][1].tolist() == first[2]
    for epoch in (first[:4], first[4:8]):
        assert len({label for batch in epoch for label in batch}) == 20
    assert Batches(x, y, 5, seed=4)[0][1].tolist() != first[0]
    assert all((a[:, 0, 0] == b).all() for a, b in (batches[step] for step in range(9)))
    drawn = torch.cat(batches.calibration(7))
    assert len(drawn) == 7
    assert torch.equal(drawn, torch.cat(again.calibration(7)))
    with pytest.raises(ConfigError, match="batch_size: got 24, expected at most 23"):
        Batches(x, y, 24, seed=0)
