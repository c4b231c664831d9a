"""What causal-conv1d's users rely on: its published grid of shapes, layouts, dtypes and options, each against float64.

The grid of options is whole; lengths and numbers of channels take turns over it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.conformance import compare, cycle

from compressm.kernels import causal_conv1d, causal_conv1d_update

ITYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512)
LONG = (784, 1024, 1134, 2048, 4096)
VARIED = (8, 16, 32, 63, 64, 65, 127, 128, 129, 151, 256, 257, 372)
FLAGS = (False, True)


def convolution_inputs(itype, channel_last, bias, width, states, length, batch=2, channels=64):
    """Tensors by name; x is a slice of a wider one."""
    wide = channels + 160
    if channel_last:
        x = torch.randn(batch, length, wide, dtype=itype)[..., 96 : 96 + channels].mT
    else:
        x = torch.randn(batch, wide, length, dtype=itype)[:, 96 : 96 + channels]
    return {
        "x": x,
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels) if bias else None,
        "initial_states": torch.randn(batch, width - 1, channels, dtype=itype).mT if states else None,
    }


def convolution(final, silu, **options):
    def call(tensors, backend):
        activation = "silu" if silu else None
        return causal_conv1d(**tensors, return_final_states=final, activation=activation, backend=backend, **options)

    return call


@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("channel_last", FLAGS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution(assert_close, itype, channel_last, width):
    for number, (bias, silu, states, final) in enumerate(itertools.product(FLAGS, repeat=4)):
        inputs = convolution_inputs(itype, channel_last, bias, width, states, cycle(LENGTHS, number + 5 * width))
        compare(convolution(final, silu), inputs, assert_close)


@pytest.mark.slow
@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("channel_last", FLAGS)
@pytest.mark.parametrize(("channels", "lengths"), [(64, LONG), (4096 + 32, (1, 130, 372))])
def test_large_convolutions(assert_close, itype, channel_last, channels, lengths):
    for number, length in enumerate(lengths):
        inputs = convolution_inputs(itype, channel_last, True, 2 + number % 3, channel_last, length, channels=channels)
        compare(convolution(channel_last, True), inputs, assert_close)


def random_segments(batch, length, padded):
    """(batch, length) int32: up to five sequences a row, numbered from 0, and padding behind them."""
    rows = []
    for _ in range(batch):
        held = int(torch.randint(length // 2, length, ())) if padded else length
        ends = torch.randperm(held - 1)[: int(torch.randint(1, 5, ()))] + 1
        row = torch.bucketize(torch.arange(length), ends.sort().values, right=True)
        rows.append(torch.where(torch.arange(length) < held, row, -1))
    return torch.stack(rows).int()


@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("padded", FLAGS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_segments_of_a_row(assert_close, itype, padded, width):
    for number, (bias, silu, channel_last) in enumerate(itertools.product(FLAGS, repeat=3)):
        length = cycle(VARIED, number + 5 * width)
        inputs = convolution_inputs(itype, channel_last, bias, width, False, length, batch=3)
        seq_idx = random_segments(3, length, padded)
        compare(convolution(False, silu, seq_idx=seq_idx), inputs, assert_close)
        out = causal_conv1d(**inputs, seq_idx=seq_idx)
        assert not out.mT[seq_idx < 0].any()
        for row, numbers, result in zip(inputs["x"], seq_idx, out, strict=True):
            for segment in numbers.unique()[int(padded) :].tolist():
                own = numbers == segment
                alone = causal_conv1d(row[None, :, own], inputs["weight"], inputs["bias"])
                assert_close(result[:, own], alone[0], "a sequence on its own")


@pytest.mark.slow
@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize(("channels", "lengths"), [(64, (512, *LONG)), (4096 + 32, (151, 372))])
def test_large_segments_of_a_row(assert_close, itype, channels, lengths):
    for length in lengths:
        inputs = convolution_inputs(itype, True, True, 4, False, length, batch=3, channels=channels)
        compare(convolution(False, True, seq_idx=random_segments(3, length, True)), inputs, assert_close)


@pytest.mark.parametrize("itype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", FLAGS)
def test_the_same_bits_every_time(itype, packed):
    tensors = convolution_inputs(itype, True, True, 4, False, 300, channels=608)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    weight = torch.randn(2, 608, 300).to(itype)
    call = convolution(False, True, seq_idx=random_segments(2, 300, True) if packed else None)
    first = None
    for _ in range(30):
        out = call(leaves, None)
        results = (out, *torch.autograd.grad((out * weight).sum(), list(leaves.values())))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def step_inputs(itype, bias, width, steps, rows, batch, channels):
    """Tensors of causal_conv1d_update by name; x and conv_state with channels next to each other in memory."""
    held = int(torch.randint(width - 1, width + 10, ()))
    return {
        "x": torch.randn(batch, steps, channels, dtype=itype).mT,
        "conv_state": torch.randn(rows, held, channels, dtype=itype).mT,
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels) if bias else None,
    }


def check_steps(assert_close, inputs, silu, circular, indices=None):
    """One call, and the states that it leaves, against as many single steps with a plain window in float64."""
    x, pool, weight, bias = inputs.values()
    held, width, batch = pool.shape[-1], weight.shape[1], x.shape[0]
    lengths = torch.randint(0, 1024, (batch,), dtype=torch.int32) if circular else None
    state = pool.clone(memory_format=torch.preserve_format)
    activation = "silu" if silu else None
    out = causal_conv1d_update(x, state, weight, bias, activation, lengths, indices)
    after, expected = pool.clone(), torch.zeros(out.shape, dtype=torch.float64)
    for entry in range(batch):
        row = entry if indices is None else int(indices[entry])
        if row < 0:
            continue
        start = int(lengths[entry]) if circular else held
        places = [(start + k) % held if circular else held + k for k in range(1 - width, x.shape[-1])]
        window = torch.cat([pool[row][:, places[: width - 1]], x[entry]], -1)
        expected[entry] = causal_conv1d(window[None].double(), weight.double(), None if bias is None else bias.double(),
                                        activation=activation)[0, :, width - 1 :]  # fmt: skip
        if circular:
            for place, value in zip(places[width - 1 :], x[entry].unbind(-1), strict=True):
                after[row][:, place] = value
        else:
            after[row] = torch.cat([pool[row], x[entry]], -1)[:, -held:]
    assert_close(out, expected, "output")
    assert torch.equal(state, after)


@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("gathered", ["rows", "pool", "padded pool"])
def test_update(assert_close, itype, steps, width, gathered):
    for bias, silu, circular in itertools.product(FLAGS, repeat=3):
        indices, rows = None, 8
        if gathered != "rows":
            indices, rows = torch.randperm(80)[:8].int(), 80
            if gathered == "padded pool":
                indices[torch.randperm(8)[:4]] = -1
        check_steps(assert_close, step_inputs(itype, bias, width, steps, rows, 8, 48), silu, circular, indices)


@pytest.mark.slow
@pytest.mark.parametrize("itype", ITYPES)
@pytest.mark.parametrize("channels", [2048, 2048 + 16, 4096])
def test_large_updates(assert_close, itype, channels):
    indices = torch.randperm(640)[:64].int()
    check_steps(assert_close, step_inputs(itype, True, 4, 4, 64, 64, channels), True, True)
    check_steps(assert_close, step_inputs(itype, True, 4, 5, 640, 64, channels), True, False, indices)
