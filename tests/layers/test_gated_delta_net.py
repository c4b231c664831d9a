"""Gated DeltaNet: the rule by hand, decoding, packed sequences, maps that stay contractions, wrong arguments."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressm.errors import ArgumentError
from compressm.layers import GatedDeltaNet
from compressm.layers.gated_delta_mixer import contraction, read

KINDS = [
    {},
    {"num_v_heads": 4, "expand_v": 1.5},
    {"d_state": 3},
    {"use_gate": False, "allow_neg_eigval": True, "conv_bias": True, "conv_size": 2},
]


def build(seed=0, **options):
    torch.manual_seed(seed)
    return GatedDeltaNet(8, head_dim=6, num_heads=2, layer_idx=0, **options).double()


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(layer, x):
    """Step by step, from the parameters."""
    heads, keys, values = layer.num_v_heads, layer.head_k_dim, layer.head_v_dim
    mixed = []
    for name in "qkv":
        conv = layer.get_submodule(f"{name}_conv1d")
        part = layer.get_submodule(f"{name}_proj")(x)
        taps, padded = conv.weight[:, 0], F.pad(part.mT, (layer.conv_size - 1, 0))
        out = sum(taps[:, j, None] * padded[..., j : j + x.shape[1]] for j in range(layer.conv_size))
        mixed.append(F.silu((out if conv.bias is None else out + conv.bias[:, None]).mT))
    q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(mixed, (keys, keys, values), strict=True))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    if layer.k_map is not None:
        q, k = torch.einsum("blhk,hrk->blhr", q, layer.q_map), torch.einsum("blhk,hrk->blhr", k, layer.k_map)
    q, k = (part.repeat_interleave(heads // layer.num_k_heads, 2) for part in (q, k))
    beta = layer.b_proj(x).sigmoid() * (2 if layer.allow_neg_eigval else 1)
    alpha = torch.exp(-layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias))
    state, outputs = torch.zeros(len(x), heads, layer.d_state, values).double(), []
    for t in range(x.shape[1]):
        state = alpha[:, t, :, None, None] * state
        new = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        outputs.append(keys**-0.5 * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    out = torch.stack(outputs, 1)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5) * layer.o_norm.weight
    if layer.use_gate:
        out = out * F.silu(layer.g_proj(x)).view_as(out)
    return layer.o_proj(out.flatten(-2))


@pytest.mark.parametrize("options", KINDS)
def test_the_rule_by_hand(options):
    layer, x = build(**options), data(2, 13, 8)
    torch.testing.assert_close(layer(x), by_hand(layer, x))


@pytest.mark.parametrize("options", KINDS)
def test_prompt_and_decoding(options):
    layer, x = build(**options), data(3, 11, 8)
    whole = layer(x)
    state = layer.allocate_inference_cache(3, dtype=torch.float64)
    steps = [layer.step(x[:, t : t + 1], *state)[0] for t in range(11)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)

    states = {0: layer.allocate_inference_cache(3, dtype=torch.float64)}
    inference = SimpleNamespace(seqlen_offset=0, key_value_memory_dict=states)
    outputs = [layer(x[:, :7], inference)]
    inference.seqlen_offset = 7
    outputs += [layer(x[:, t : t + 1], inference) for t in range(7, 11)]
    torch.testing.assert_close(torch.cat(outputs, 1), whole)


def test_packed_sequences_do_not_see_each_other():
    layer, x = build(), data(1, 12, 8)
    bounds = torch.tensor([0, 5, 6, 12])
    apart = torch.cat([layer(x[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))], 1)
    torch.testing.assert_close(layer(x, cu_seqlens=bounds), apart)
    torch.testing.assert_close(layer(x, seq_idx=torch.tensor([[0] * 5 + [1] + [2] * 6])), apart)


def test_sub_modules_are_called():
    layer, x = build(), data(2, 5, 8)
    seen = []
    for name, module in layer.named_children():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(x)
    assert sorted(seen) == sorted(name for name, _ in layer.named_children())
    before = layer(x)
    layer.k_conv1d = nn.utils.parametrizations.weight_norm(layer.k_conv1d)
    torch.testing.assert_close(layer(x), before)


def test_maps_stay_contractions():
    """Whatever an optimizer makes of them: long sequences with the same key at every step stay bounded."""
    layer = build(d_state=3, allow_neg_eigval=True)
    optimizer = torch.optim.SGD([layer.k_map, layer.q_map], lr=10.0)
    for step in range(5):
        layer(data(2, 9, 8, seed=step)).square().sum().mul(-1).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.linalg.matrix_norm(contraction(layer.k_map), 2).max() <= 1 + 1e-12
    with torch.no_grad():
        layer.k_map.mul_(5)
        layer.b_proj.weight.mul_(100)
        x = data(1, 1, 8).expand(1, 3000, 8)
        k = read(layer, x).k
        assert k.norm(dim=-1).max() <= 1
        state = layer.allocate_inference_cache(1, dtype=torch.float64)
        layer.mixing(x, state)
        assert state[1].abs().max() < 1e3
        inside = 0.3 * layer.k_map / torch.linalg.matrix_norm(layer.k_map, 2).max()
        assert torch.equal(contraction(inside), inside)


def test_decoding_takes_eigenvalues_once_and_hears_every_write(monkeypatch):
    layer, x, taken = build(d_state=3), data(2, 7, 8), []
    eigenvalues = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: taken.append(1) or eigenvalues(matrix))

    def decoded():
        states = layer.allocate_inference_cache(2, dtype=torch.float64)
        return torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(7)], 1)

    writes = [
        lambda: layer.k_map.data.mul_(2), lambda: layer.k_map.data[1, 2].add_(1),
        lambda: layer.k_map.detach().numpy().fill(0.7), lambda: setattr(layer, "k_map", nn.Parameter(layer.k_map.detach() * 3)),
    ]  # fmt: skip
    for count, write in enumerate(writes, 1):
        write()
        with torch.inference_mode():
            torch.testing.assert_close(decoded(), layer(x))
        assert len(taken) == count
        assert torch.equal(read(layer.requires_grad_(False), x).k, read(layer.requires_grad_(True), x).k)
        taken.pop()
    with torch.no_grad():
        first = layer(x)
    layer.k_map.requires_grad_(False)
    inputs = x.clone().requires_grad_()
    layer(inputs).sum().backward()  # what inference has kept is of use to autograd
    assert inputs.grad.abs().max() > 0
    layer.k_map.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.k_map.grad.abs().max() > 0
    assert len(taken) == len(writes) + 1
    again = torch.load(_stored(layer), weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(x), first)
    assert "_contracted" not in layer.state_dict()


def _stored(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def test_gradients_reach_every_parameter():
    layer = build(d_state=3, num_v_heads=4)
    layer(data(2, 9, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in layer.parameters())


def test_initialisation():
    layer = GatedDeltaNet(8, head_dim=6, num_heads=3, d_state=4)
    dt = F.softplus(layer.dt_bias)
    assert ((dt > 9e-5) & (dt < 0.11)).all()
    assert ((layer.A_log.exp() > 0) & (layer.A_log.exp() <= 16)).all()
    torch.testing.assert_close(layer.k_map @ layer.k_map.mT, torch.eye(4).expand(3, 4, 4), rtol=1e-5, atol=1e-5)
    before = layer.q_proj.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.q_proj.weight, before)
    assert (layer.head_k_dim, layer.d_state, layer.head_v_dim) == (6, 4, 12)
    assert layer.kernel_plan is None
    layer(torch.randn(1, 5, 8))
    assert layer.kernel_plan.op == "gated_delta_rule"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 0}, "head_dim: expected a positive integer"),
        ({"num_v_heads": 3}, "num_v_heads: expected a multiple of num_heads = 2"),
        ({"expand_v": 0.55}, "expand_v: expected a positive whole number"),
        ({"d_state": 7}, "d_state: expected an integer from 1 to head_dim = 6"),
        ({"d_state": True}, "d_state"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(ArgumentError, match=words):
        GatedDeltaNet(8, **{"head_dim": 6, "num_heads": 2, **options})


def test_wrong_calls():
    layer = build()
    with pytest.raises(ArgumentError, match="hidden_states"):
        layer(data(2, 5, 7))
    with pytest.raises(ArgumentError, match="ssm_state"):
        layer.step(data(2, 1, 8), layer.allocate_inference_cache(2)[0], torch.zeros(2, 2, 5, 12))
