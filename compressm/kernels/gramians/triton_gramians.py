"""Triton backend of the Gramians: all four matrices of many systems of different shapes in one launch.

One program computes one tile of the upper triangle and writes it twice: P and Q are Hermitian, S and S_Q symmetric.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from compressm.kernels.core import triton_language
from compressm.kernels.core.triton_language import jit, tl

Config = dict[str, int | bool]  # tiles of T x T pairs of states, and launch options
TILE = 16
CONFIG: Config = {"T": TILE, "num_warps": TILE**2 // triton_language.WARP, "enable_fp_fusion": True}  # a pair a lane

Quad = tuple[Tensor, Tensor, Tensor, Tensor]


class Layout(NamedTuple):
    """Where a batch of ``count`` systems with n states lies in the packed buffers; numbers of elements from their starts."""

    count: int
    n: int
    inputs: int
    outputs: int
    spectrum: int  # (count, n) in each row of the spectra
    B: int  # (count, inputs, n) in each plane of the features
    C: int  # (count, outputs, n) in each plane of the features
    quad: int  # (4, count, n, n) complex


@jit
def _products(features, plane, K, n, i, j):
    """sum_k F_ki F_kj of the real and imaginary parts of F (K, n): re re, im im, re im and im re, float64 shaped like i."""
    rr = tl.zeros(i.shape, tl.float64)
    ii = tl.zeros(i.shape, tl.float64)
    ri = tl.zeros(i.shape, tl.float64)
    ir = tl.zeros(i.shape, tl.float64)
    for _ in range(0, K):
        re_i = tl.load(features + i)
        im_i = tl.load(features + plane + i)
        re_j = tl.load(features + j)
        im_j = tl.load(features + plane + j)
        rr += re_i * re_j
        ii += im_i * im_j
        ri += re_i * im_j
        ir += im_i * re_j
        features += n
    return rr, ii, ri, ir


@jit
def _denominator(plain, product, d):
    """1 - exp(log_lam_i + log_lam_j) for the phase d of the exponential; see reference.denominators."""
    s = tl.sin(d * 0.5)
    return plain + 2.0 * product * s * s, -product * tl.sin(d)


@jit
def _store_quotient(out, n, i, j, a, b, c, d, MIRROR: tl.constexpr):
    """Write (a + i b) / (c + i d) to the upper triangle of out (n, n) and its transpose, times MIRROR in the imaginary part."""
    scale = 1.0 / (c * c + d * d)
    re = (a * c + b * d) * scale
    im = (b * c - a * d) * scale
    there = out + 2 * (i * n + j)
    mirrored = out + 2 * (j * n + i)
    tl.store(there, re, mask=(i <= j) & (j < n))
    tl.store(there + 1, im, mask=(i <= j) & (j < n))
    tl.store(mirrored, re, mask=(i < j) & (j < n))
    tl.store(mirrored + 1, MIRROR * im, mask=(i < j) & (j < n))


@jit(do_not_specialize=["work", "systems", "spectra", "features", "out", "states", "plane"])
def _gramians_kernel(work, systems, spectra, features, out, states, plane, T: tl.constexpr):
    """One tile of the four Gramians of one system.

    work (programs, 4) int64: row of systems, member of its batch, first row and column of the tile.  systems: Layout rows,
    int64.  spectra (3, states): exp(a), -expm1(a) and phase of log_lam = a + i phase.  features (2, plane): real and
    imaginary parts of B^T and conj(C).  out: float64 pairs.
    """
    work += tl.program_id(0) * 4
    system = systems + tl.load(work) * 8
    member = tl.load(work + 1)
    # The tile is one row of T * T pairs (i, j): a square would change its layout through shared memory at every k.
    i = tl.load(work + 2) + tl.arange(0, T * T) // T
    j = tl.load(work + 3) + tl.arange(0, T * T) % T
    count = tl.load(system)
    n = tl.load(system + 1)
    inputs = tl.load(system + 2)
    outputs = tl.load(system + 3)
    spectra += tl.load(system + 4) + member * n
    at_i = tl.minimum(i, n - 1)  # beyond the edge of the matrix the last state is read and nothing written
    at_j = tl.minimum(j, n - 1)
    e_i = tl.load(spectra + at_i)
    e_j = tl.load(spectra + at_j)
    theta_i = tl.load(spectra + 2 * states + at_i)
    theta_j = tl.load(spectra + 2 * states + at_j)
    spectra += states
    plain = tl.load(spectra + at_i) + e_i * tl.load(spectra + at_j)
    h_re, h_im = _denominator(plain, e_i * e_j, theta_i - theta_j)
    s_re, s_im = _denominator(plain, e_i * e_j, theta_i + theta_j)
    matrix = count * n * n * 2
    out += tl.load(system + 7) * 2 + member * n * n * 2
    rr, ii, ri, ir = _products(features + tl.load(system + 5) + member * inputs * n, plane, inputs, n, at_i, at_j)
    _store_quotient(out, n, i, j, rr + ii, ir - ri, h_re, h_im, -1.0)
    _store_quotient(out + matrix, n, i, j, rr - ii, ri + ir, s_re, s_im, 1.0)
    rr, ii, ri, ir = _products(features + tl.load(system + 6) + member * outputs * n, plane, outputs, n, at_i, at_j)
    _store_quotient(out + 2 * matrix, n, i, j, rr + ii, ir - ri, h_re, -h_im, -1.0)
    _store_quotient(out + 3 * matrix, n, i, j, rr - ii, ri + ir, s_re, -s_im, 1.0)


def why_not(device: str) -> str | None:
    """None if the kernel runs for tensors of this device type, else the reason."""
    return triton_language.why_not(device, _gramians_kernel)


def gramian_quads(systems: Sequence[tuple[Tensor, Tensor, Tensor]], config: Config = CONFIG) -> list[Quad]:
    """(P, S, Q, S_Q) of every system, (..., N, N) complex128; see :class:`compressm.kernels.Gramians`.

    Args:
        systems: (log_lam (..., N), B (..., N, H_in), C (..., H_out, N)) each, complex128, on one device.
    """
    batches = [torch.broadcast_shapes(log_lam.shape[:-1], B.shape[:-2], C.shape[:-2]) for log_lam, B, C in systems]
    layouts = _layouts(systems, batches)
    work = _work(layouts, config["T"])
    device = systems[0][0].device
    last = layouts[-1]
    out = torch.empty(last.quad + 4 * last.count * last.n**2, dtype=torch.complex128, device=device)
    if len(work):
        spectra, features = _pack(systems, batches, layouts)
        rows = torch.tensor(layouts, dtype=torch.int64).to(device)
        with triton_language.on_device(out):
            _gramians_kernel[(len(work),)](
                torch.from_numpy(work).to(device), rows, spectra, features, torch.view_as_real(out),
                spectra.shape[1], features.shape[1], **config,
            )  # fmt: skip
    quads = []
    for batch, at in zip(batches, layouts, strict=True):
        size = 4 * at.count * at.n**2
        quads.append(tuple(out[at.quad : at.quad + size].view(4, *batch, at.n, at.n)))
    return quads


def _layouts(systems: Sequence[tuple[Tensor, Tensor, Tensor]], batches: Sequence[torch.Size]) -> list[Layout]:
    layouts = []
    spectrum = feature = quad = 0
    for (log_lam, B, C), batch in zip(systems, batches, strict=True):
        count, n, inputs, outputs = batch.numel(), log_lam.shape[-1], B.shape[-1], C.shape[-2]
        middle = feature + count * inputs * n
        layouts.append(Layout(count, n, inputs, outputs, spectrum, feature, middle, quad))
        spectrum += count * n
        feature = middle + count * outputs * n
        quad += 4 * count * n * n
    return layouts


def _work(layouts: Sequence[Layout], size: int) -> np.ndarray:
    """(programs, 4) int64: system, member of its batch, first row and column of a tile of the upper triangle, ``size`` wide."""
    tables = [np.zeros((0, 4), np.int64)]
    for index, at in enumerate(layouts):
        rows, columns = np.triu_indices(-(-at.n // size))
        members = np.repeat(np.arange(at.count), len(rows))
        tile = [np.tile(part, at.count) * size for part in (rows, columns)]
        tables.append(np.stack([np.full_like(members, index), members, *tile], 1))
    return np.concatenate(tables)


def _pack(
    systems: Sequence[tuple[Tensor, Tensor, Tensor]], batches: Sequence[torch.Size], layouts: Sequence[Layout]
) -> tuple[Tensor, Tensor]:
    """Spectra (3, states) and features (2, elements), float64; see the kernel."""
    last, device = layouts[-1], systems[0][0].device
    log_lams = torch.empty(last.spectrum + last.count * last.n, dtype=torch.complex128, device=device)
    features = torch.empty(last.C + last.count * last.outputs * last.n, dtype=torch.complex128, device=device)
    for (log_lam, B, C), batch, at in zip(systems, batches, layouts, strict=True):
        for buffer, start, source, shape in (
            (log_lams, at.spectrum, log_lam, (at.n,)),
            (features, at.B, B.mT, (at.inputs, at.n)),
            (features, at.C, C.conj(), (at.outputs, at.n)),
        ):
            target = buffer[start : start + at.count * int(np.prod(shape))]
            target.view(*batch, *shape).copy_(source)
    spectra = torch.stack([log_lams.real.exp(), -torch.expm1(log_lams.real), log_lams.imag])
    return spectra, torch.stack([features.real, features.imag])
