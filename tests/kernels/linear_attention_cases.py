"""Inputs of linear attention, its recurrence, and one evaluation of outputs and gradients."""

from __future__ import annotations

import itertools

import torch
from kernels.evaluation import normals, with_gradients

from compressm.kernels import linear_attention

DECAYS = ["none", "fixed", "scalar", "channel"]


def random_inputs(
    batch=2, length=33, key_heads=2, heads=4, keys=5, values=3, *, decay="channel", strength=1.0, sequences=None,
    normalize=False, seed=0,
):  # fmt: skip
    """Float64 arguments of linear_attention by name.

    Args:
        strength: log decays lie between zero and minus a few times this.
        sequences: number of initial states, where it is not the batch; 0: none are given.
        normalize: states have the normaliser.
    """
    normal = normals(seed)
    shapes = {"fixed": (heads,), "scalar": (batch, length, heads), "channel": (batch, length, heads, keys)}
    states = batch if sequences is None else sequences
    inputs = {
        "q": normal(batch, length, key_heads, keys),
        "k": normal(batch, length, key_heads, keys),
        "v": normal(batch, length, heads, values),
        "g": None if decay == "none" else -strength * normal(*shapes[decay]).exp() / 4,
        "initial_state": normal(states, heads, keys, values + normalize) if states or sequences is None else None,
    }
    if normalize:  # what is divided by stays away from zero
        inputs["q"], inputs["k"] = inputs["q"].abs(), inputs["k"].abs()
        if inputs["initial_state"] is not None:
            inputs["initial_state"][..., -1].abs_()
    return inputs


def recurrence(q, k, v, g=None, initial_state=None, *, scale=None, cu_seqlens=None, normalize=False):
    """(out, final states) as flash-linear-attention's recurrences have them, each sequence by itself."""
    (batch, length, key_heads, keys), (heads, values) = q.shape, v.shape[2:]
    scale = keys**-0.5 if scale is None else scale
    bounds = None if cu_seqlens is None else list(itertools.pairwise(cu_seqlens.tolist()))
    places = [(b, 0, length) for b in range(batch)] if bounds is None else [(0, *ends) for ends in bounds]
    if g is None:
        g = q.new_zeros(heads)
    decays = (g.exp().unsqueeze(-1) if g.dim() < 4 else g.exp()).expand(batch, length, heads, keys)
    keys_of = [h * key_heads // heads for h in range(heads)]
    outputs, lasts = [], []
    for i, (b, first, stop) in enumerate(places):
        S = q.new_zeros(heads, keys, values + normalize) if initial_state is None else initial_state[i]
        S, z = S[..., :values], S[..., values:].sum(-1)
        for t in range(first, stop):
            query, key, left = scale * q[b, t, keys_of], k[b, t, keys_of], decays[b, t]
            S = left[..., None] * S + key[..., None] * v[b, t, :, None, :]
            z = left * z + key
            read = torch.einsum("hk,hkv->hv", query, S)
            outputs.append(read / ((query * z).sum(-1, keepdim=True) + 1e-10) if normalize else read)
        lasts.append(torch.cat([S, z[..., None]], -1) if normalize else S)
    return torch.stack(outputs).view(v.shape), torch.stack(lasts)


def evaluate(inputs, dtype, backend, *, call=linear_attention, device="cpu", **options):
    """Outputs and the gradients of a random linear functional of (out, final states), on the CPU, by name.

    q, k and v get ``dtype``, the others at least float32.
    """
    leaves = {}
    for name, tensor in inputs.items():
        wide = dtype if name in "qkv" else torch.promote_types(dtype, torch.float32)
        leaves[name] = None if tensor is None else tensor.to(device, wide).detach().requires_grad_()
    if call is not recurrence:
        options |= {"backend": backend, "output_final_state": True}
    out, last = call(**leaves, **options)
    return with_gradients(leaves, out=out, last=last)
