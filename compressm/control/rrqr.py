"""Rank-revealing QR with column pivoting, of a matrix X of which X^T X alone is known.

R is the Cholesky factor of X^T X with its rows and columns permuted, so that choosing columns needs nothing else.  Source: Gu
and Eisenstat, SIAM J. Sci. Comput. 17 (1996), algorithms 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12  # share of the mean square of a column below which what is left of one counts as nothing


def pivoted(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Greedy pivots: each time the column of which the earlier ones explain least.

    Args:
        gram: (N, N) float64, X^T X.
        rank: how many pivots are taken by size; the other columns follow in the order of what is left of them.

    Returns:
        (N,) int64, the columns in their new order, and (N,) float64, the squares of what is left of each when it is taken.
    """
    rest = gram.diagonal().clamp_min(0).clone()
    floor = FLOOR * rest.mean()
    taken = torch.zeros_like(rest, dtype=torch.bool)
    factor = torch.zeros_like(gram)  # columns of L with L L^T = gram, in the order of the pivots
    order, squares = [], []
    for step in range(rank):
        pivot = int(torch.where(taken, -1.0, rest).argmax())
        order.append(pivot)
        squares.append(rest[pivot].clone())
        taken[pivot] = True
        if bool(rest[pivot] > floor):
            factor[:, step] = (gram[:, pivot] - factor @ factor[pivot]) / rest[pivot].sqrt()
            rest = (rest - factor[:, step].square()).clamp_min(0)
    others = (~taken).nonzero().flatten()
    others = others[rest[others].argsort(descending=True, stable=True)]
    return torch.cat([others.new_tensor(order), others]), torch.cat([rest.new_tensor(squares), rest[others]])


def strong_pivots(gram: Tensor, rank: int, factor: float, swaps: int) -> Tensor:
    """(rank,) int64 ascending: columns whose volume no swap of one for another makes more than ``factor`` times as large.

    With A = X[:, kept] and B the others, a swap of i and j multiplies the volume by the root of
    (A^+ B)_ij^2 + (c_j / w_i)^2, where c_j is the length of what A leaves of column j and 1 / w_i that of row i of A^+.

    Args:
        gram: (N, N) float64, X^T X.
        rank: columns to keep, 1 to N.
        factor: at least 1.
        swaps: at most so many.
    """
    order, _ = pivoted(gram, rank)
    kept, others = order[:rank].clone(), order[rank:].clone()
    ridge = FLOOR * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    for _ in range(swaps if len(others) else 0):
        square = gram[kept][:, kept]
        inverse = torch.linalg.inv(square + ridge * torch.eye(rank).to(square))
        cross = gram[kept][:, others]
        predicted = inverse @ cross
        left = (gram.diagonal()[others] - (cross * predicted).sum(0)).clamp_min(0)
        gains = (predicted.square() + inverse.diagonal().clamp_min(0)[:, None] * left).sqrt()
        best = int(gains.argmax())
        row, column = divmod(best, len(others))
        if not bool(gains[row, column] > factor):
            break
        kept[row], others[column] = others[column].clone(), kept[row].clone()
    return kept.sort().values
