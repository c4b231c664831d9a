"""A subset of a system's own modes, chosen backwards by the error each removal costs, with C refitted.

The optimal brain surgeon (Hassibi and Stork 1993) on states: with P the covariance of the states, removing states and
predicting them linearly from the kept ones costs tr(C_j Pi_jj^{-1} C_j^H), Pi the inverse of P on what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressm.control.coordinates import Coordinates

RIDGE = 1e-6


def obs_subset(coordinates: Coordinates, P: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Choose ``rank`` modes.

    Args:
        coordinates: the full system.
        P: (n, n) covariance of its states.
        rank: modes to keep.

    Returns:
        modes (rank,) int64 ascending, and the embedding (n, m) that predicts all states from those of the kept modes
        (m = 2 rank in the real convention, [Re; Im], else rank).
    """
    n, order = coordinates.size, coordinates.order
    eye = torch.eye(n, dtype=P.dtype, device=P.device)
    trace = torch.trace(P).real
    ridged = P + (RIDGE * trace / n if bool(trace > 0) else 1.0) * eye
    inverse = torch.linalg.inv(ridged)
    C = coordinates.C.to(P.dtype).clone()
    groups = torch.arange(n, device=P.device).view(-1, order).T  # (N, 1) or (N, 2): the coordinates of every mode
    alive = torch.ones(order, dtype=torch.bool, device=P.device)
    for _ in range(order - rank):
        blocks = inverse[groups[:, :, None], groups[:, None, :]]  # (N, g, g)
        blocks = torch.where(alive[:, None, None], blocks, torch.eye(groups.shape[1], dtype=P.dtype, device=P.device))
        columns = C.T[groups]  # (N, g, H)
        cost = (columns.conj() * torch.linalg.solve(blocks.mT, columns)).sum((1, 2)).real
        cost = torch.where(alive, cost, torch.inf)
        mode = int(cost.argmin())
        index = groups[mode]
        gain = torch.linalg.solve(inverse[index][:, index], inverse[index])  # (g, n)
        C = C - C[:, index] @ gain
        inverse = inverse - inverse[:, index] @ gain
        inverse[index], inverse[:, index], C[:, index] = 0, 0, 0
        alive[mode] = False
    modes = alive.nonzero().flatten()
    kept = groups[modes].T.flatten()
    embedding = torch.linalg.solve(ridged[kept][:, kept], ridged[kept]).mH
    return modes, embedding
