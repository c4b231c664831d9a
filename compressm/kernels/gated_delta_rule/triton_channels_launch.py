"""Launches of the kernels of decays of channels, which the gated delta rule and linear attention share."""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressm.kernels.gated_delta_rule import triton_call as shared
from compressm.kernels.gated_delta_rule import triton_channels as fwd
from compressm.kernels.gated_delta_rule import triton_channels_backward as bwd
from compressm.kernels.ssd.triton_chunks import wide


class Given(NamedTuple):
    """What the operands are made of.

    Attributes:
        beta: None for ones.
        q_lengths, k_lengths: what brings q and k to length one, or None.
        erases: steps read along k before they write; else this is linear attention.
    """

    q: Tensor
    k: Tensor
    g: Tensor
    beta: Tensor | None
    q_lengths: Tensor | None
    k_lengths: Tensor | None
    scale: float
    erases: bool

    @property
    def own(self) -> int:
        return self.g.shape[2] // self.q.shape[2]

    def strides(self) -> tuple[int, ...]:
        beta = (0, 0, 0) if self.beta is None else self.beta.stride()
        return (*self.q.stride(), *self.k.stride(), *self.g.stride(), *beta)

    def tensors(self, call: shared.Call) -> tuple[Tensor | None, ...]:
        return (*self[:6], call.chunks.starts, call.chunks.counts)


def operands_of(given: Given, call: shared.Call) -> shared.Operands:
    """q, k and into with their factors and decays, each value head its own."""
    chunks, (length, row, heads), T = call.chunks, call.sizes, call.config["T"]
    padded = -(-call.K // 8) * 8
    shape = (*given.g.shape[:3], padded)
    q, into = (given.q.new_empty(shape, dtype=call.dtype) for _ in range(2))
    k = torch.empty_like(q) if given.erases else None
    passing = q.new_empty((chunks.count, heads, call.K), dtype=torch.float32)
    columns = -(-call.K // call.config["BC"])
    fwd._channel_operands_kernel[(chunks.count * heads * columns,)](
        *given.tensors(call), q, k, into, passing, length, row, heads, given.own, call.K, padded, given.scale,
        *given.strides(), T=T, BN=call.config["BC"], **shared.SMALL,
    )  # fmt: skip
    reads = q.new_empty((chunks.count, heads, T, T))
    erased = torch.empty_like(reads, dtype=torch.float32) if given.erases else None
    fwd._channel_products_kernel[(chunks.count * heads * (T // 16),)](
        *given.tensors(call), reads, erased, length, row, heads, given.own, call.K, given.scale, *given.strides(),
        BN=call.config["BC"], **call.options(),
    )  # fmt: skip
    inverse = shared.inverse_of(erased, call) if given.erases else None
    q, k, into = (t if t is None else t[..., : call.K] for t in (q, k, into))
    return shared.Operands(q, k, into, 1, None, passing, reads, erased, inverse)


def gradients_of(
    given: Given,
    operands: shared.Operands,
    grad_o: Tensor,
    grad_v: Tensor,
    writes: Tensor,
    pairs: list[Tensor],
    states: Tensor,
    grad_states: Tensor,
    call: shared.Call,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Gradients of q and k, where they have lengths in float32 and but for the change of those, of g and of beta."""
    chunks, (length, row, heads), K, BN = call.chunks, call.sizes, call.K, call.config["BC"]
    padded, columns = -(-K // 8) * 8, -(-K // BN)
    inner = grad_o.new_empty((3, *given.g.shape[:3], padded), dtype=torch.float32)
    of_q, of_k, of_into = inner[0], inner[1] if given.erases else None, inner[2]
    bwd._channel_within_kernel[(chunks.count * heads * (call.config["T"] // 16) * columns,)](
        *given.tensors(call), *pairs[:2], of_q, of_k, of_into, length, row, heads, given.own, K, padded, given.scale,
        *given.strides(), BN=call.config["BC"], **call.options(),
    )  # fmt: skip
    dtype = None if given.q_lengths is None else torch.float32
    grads = [torch.empty_like(t, dtype=dtype) for t in (given.q, given.k)]
    grad_g, batch = torch.empty_like(given.g), given.g.shape[0]
    by_gain = None if given.beta is None else inner.new_empty((columns, batch, length, heads))
    bwd._channel_keys_kernel[(chunks.count * given.q.shape[2] * columns,)](
        *given.tensors(call), grad_o, grad_v, writes, operands.passing, of_q, of_k, of_into, states, grad_states, *grads,
        grad_g, by_gain, length, row, heads, given.own, K, call.V, padded, call.padded, batch * length, given.scale,
        *given.strides(), *grad_o.stride(), *grad_v.stride(), *writes.stride(), *grads[0].stride(), *grads[1].stride(),
        *grad_g.stride(), WIDE=wide(grad_o, grad_v, writes), BN=call.config["BC"], **call.options("BV"),
    )  # fmt: skip
    return grads, grad_g, None if given.beta is None else torch.empty_like(given.beta).copy_(by_gain.sum(0))
