"""Retention whose queries and keys turn with their position loses pairs of channels, and those that stay turn as before."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters.linear_layers import MultiScaleRetention
from torch import nn

import compressm
from compressm.adapters import find_layers
from compressm.compression.planning.calibration import collect
from compressm.errors import ArgumentError, CheckpointError
from compressm.integrations.resizing import follow, resize_on_load, resize_to
from compressm.layers import LinearAttention

K, CUT = 6, {"multiple_of": 1}


def lively(seed=0, channels=K, **options):
    torch.manual_seed(seed)
    layer = MultiScaleRetention(rotary="fla", hidden_size=8, num_heads=2, expand_k=channels / 4, **options).double()
    with torch.no_grad():
        for part in (layer.q_proj, layer.k_proj):
            part.weight.normal_()
            part.weight.view(-1, channels, 8).mul_(torch.linspace(0.2, 1, channels)[:, None].roll(2, 0))
    layer.rotary.float()  # its library keeps it so in models of single precision
    return layer.requires_grad_(False)


def data(*shape, seed=1):
    return torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(layer, x):
    return collect(layer, find_layers(layer), [x], rows_per_state=None)[""]


def kept_pairs(layer, x, rank):
    adapter = find_layers(layer)[""][1]
    return adapter.analyse(layer, "", "real", moments(layer, x)).reduce(rank).rows[0, : rank // 2]


def by_hand(layer, pairs):
    """A layer of the library's own constructor with those pairs, which turn as they did."""
    rank = 2 * len(pairs)
    other = lively(channels=rank, num_kv_heads=layer.num_kv_heads)
    rows, state = torch.cat([pairs, layer.head_k_dim // 2 + pairs]), layer.state_dict()
    for name in ("q_proj.weight", "k_proj.weight"):
        state[name] = state[name].view(-1, layer.head_k_dim, 8)[:, rows].flatten(0, 1)
    state["q_proj.weight"] = state["q_proj.weight"] * (rank / layer.head_k_dim) ** 0.5
    other.load_state_dict({name: value for name, value in state.items() if "rotary" not in name})
    other.rotary.inv_freq.copy_(layer.rotary.inv_freq[pairs])
    return other


@pytest.mark.parametrize("kv", [2, 1])
def test_all_channels_change_no_output(kv):
    layer, x = lively(num_kv_heads=kv), data(3, 11)
    before = layer(x)
    (report,) = compressm.compress(layer, compressm.FixedRank(K), calibration=[x], **CUT).layers
    adapter = find_layers(layer)[""][1]
    edit = adapter.edit(layer, adapter.analyse(layer, "", "real", moments(layer, x)).reduce(K))
    with torch.no_grad():
        for name, value in edit.tensors.items():
            layer.get_parameter(name).copy_(value)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-10)
    assert torch.equal(edit.attributes["rotary.inv_freq"], layer.rotary.inv_freq)
    assert report.rank_after == K


@pytest.mark.parametrize("kv", [2, 1])
def test_a_cut_is_a_layer_of_the_kept_pairs(kv):
    layer, x = lively(num_kv_heads=kv), data(3, 11)
    pairs, turns = kept_pairs(layer, x, 4), layer.rotary.inv_freq.clone()
    assert pairs.tolist() != [0, 1]  # what a new layer of that size would turn by
    expected = by_hand(layer, pairs)
    assert layer(x).isfinite().all()  # tables of all pairs are there
    (report,) = compressm.compress(layer, compressm.FixedRank(4), calibration=[x], **CUT).layers
    assert report.method == "strict, backward subset of pairs"
    assert (layer.head_k_dim, layer.key_dim, layer.key_dim_per_group, layer.expand_k) == (4, 8, 4 * kv, 1)
    assert (layer.rotary.dim, layer.rotary.inv_freq.dtype) == (4, torch.float32)
    assert torch.equal(layer.rotary.inv_freq, turns[pairs])
    torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=1e-12)
    pair = kept_pairs(layer, x, 2)
    compressm.compress(layer, compressm.FixedRank(2), calibration=[x], **CUT)
    assert torch.equal(layer.rotary.inv_freq, turns[pairs[pair]])


def test_energies_are_those_of_the_pairs_outputs():
    """What a removal takes away is the energy of the outputs that the pairs make, from turned queries and states."""
    layer, x = lively(), data(2, 9)
    angles = torch.arange(9)[:, None, None] * layer.rotary.inv_freq.double()
    q, k = (part(x).unflatten(-1, (2, 2, K // 2)) for part in (layer.q_proj, layer.k_proj))
    q, k = (torch.complex(*part.unbind(3)) * torch.polar(torch.ones(()).double(), angles) for part in (q, k))
    v, decay = layer.v_proj(x).unflatten(-1, (2, 4)), layer.decays(x)[0, 0, :, 0].exp()
    state, z = torch.zeros(2, 2, K // 2, 4, dtype=torch.complex128), []
    for t in range(9):
        state = decay[:, None, None] * state + k[:, t, ..., None] * v[:, t, :, None]
        z.append((q[:, t, ..., None].conj() * state).real)
    z = torch.stack(z)
    expected = torch.einsum("tbhnv,tbhmv->nm", z, z) / 18
    found = moments(layer, x).Z.sum(0).unflatten(0, (2, -1)).unflatten(2, (2, -1)).sum((0, 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gone = int(expected.diagonal().argmin())
    assert kept_pairs(layer, x, 4).tolist() == [pair for pair in range(3) if pair != gone]
    spectrum = find_layers(layer)[""][1].analyse(layer, "", "real", moments(layer, x)).hsv
    torch.testing.assert_close(spectrum[0::2], spectrum[1::2])
    assert float(spectrum[4:].square().sum()) == pytest.approx(float(expected[gone, gone]), rel=1e-4)


def test_moments_are_the_reduced_layer_s_own_gradients():
    layer, x = lively(), data(3, 12)
    for part in (layer.q_proj, layer.k_proj):
        part.weight.view(2, K, 8)[:, [1, 4]] = 0
    layer.requires_grad_(True)
    adapter = find_layers(layer)[""][1]
    edit = adapter.edit(layer, adapter.analyse(layer, "", "real", moments(layer, x)).reduce(4))
    names = ("q_proj.weight", "k_proj.weight")

    def gradients():
        loss = (layer(x) * torch.linspace(-1, 2, 8).double()).square().sum()
        return dict(zip(names, torch.autograd.grad(loss, [layer.get_parameter(name) for name in names]), strict=True))

    carried = edit.first_moments(gradients())
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x], **CUT)
    for name, expected in gradients().items():
        torch.testing.assert_close(carried[name], expected, rtol=1e-6, atol=1e-8)


def test_decoding_with_a_cache_gives_the_whole_sequence_s_outputs():
    layer, x, cache = lively(), data(3, 11), {}
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x], **CUT)
    layer(x[:, :3])  # short tables first
    steps = [layer(x[:, :4], cache=cache)] + [layer(x[:, t : t + 1], cache=cache) for t in range(4, 11)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_precision_makes_the_pairs_turn_otherwise(dtype):
    layer, x = lively().float(), data(3, 11).float()
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x], **CUT)
    turns, angle = layer.rotary.inv_freq.clone(), 1000 * layer.rotary.inv_freq
    layer.to(dtype)
    layer.rotary.reset_parameters()
    assert torch.equal(layer.rotary.inv_freq.float(), turns)
    ones = torch.ones(1, 1, 1, 4, dtype=dtype)
    q, _ = layer.rotary(ones, ones, seqlen_offset=1000)
    expected = torch.cat([angle.cos() - angle.sin(), angle.sin() + angle.cos()])
    torch.testing.assert_close(q.flatten().float(), expected, rtol=0.02, atol=0.02)
    other = copy.deepcopy(layer)
    assert torch.equal(other.rotary.inv_freq, layer.rotary.inv_freq)


def test_a_model_in_half_precision_is_cut_by_the_exact_frequencies():
    layer, x = lively(), data(3, 11)
    exact = layer.rotary.inv_freq.clone()
    layer.bfloat16()
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x.bfloat16()], **CUT)
    assert set(layer.rotary.inv_freq.tolist()) < set(exact.tolist())


def test_checkpoints_carry_the_frequencies(tmp_path):
    x, path = data(3, 11), tmp_path / "c.safetensors"
    layer, full, small, other = lively(), lively(1), lively(2, channels=4), lively(3)
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x], **CUT)
    compressm.compress(other, compressm.FixedRank(4), calibration=[x], **CUT)
    other.rotary.inv_freq.mul_(2)
    assert not torch.equal(other(x), layer(x))  # its tables are those of other frequencies
    compressm.save(path, layer)
    for target in (full, small, other):
        compressm.load(path, target)
        assert torch.equal(target.rotary.inv_freq, layer.rotary.inv_freq)
        torch.testing.assert_close(target(x), layer(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*rotary\.inv_freq"):
        lively(channels=4).load_state_dict(layer.state_dict())
    compressm.load(compressm.save(path, lively(5)), layer)  # of no cut: computed as the class does
    assert "rotary.inv_freq" not in layer.state_dict()
    torch.testing.assert_close(layer(x), lively(5)(x), rtol=0, atol=0)
    assert type(layer.rotary) is type(full.rotary).__mro__[2]


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    layer, wide, x = lively(), MultiScaleRetention(rotary="fla", hidden_size=12, num_heads=2, expand_k=1), data(3, 11)
    compressm.compress(wide, compressm.FixedRank(4), **CUT)
    compressm.save(tmp_path / "c.safetensors", wide)
    before, kind = layer(x), type(layer.rotary)
    with pytest.raises(CheckpointError):
        compressm.load(tmp_path / "c.safetensors", layer)
    assert type(layer.rotary) is kind
    assert not [name for name in layer.state_dict() if "rotary" in name]
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("resize", [True, False])
def test_weights_of_a_cut_layer_are_taken_by_resizing(resize):
    layer, x = nn.Sequential(lively()), data(3, 11)
    compressm.compress(layer, compressm.FixedRank(4), calibration=[x], **CUT)
    target = nn.Sequential(lively(1))
    if resize:
        resize_to(target, layer.state_dict())
    else:
        resize_on_load(target)
    target.load_state_dict(layer.state_dict())
    torch.testing.assert_close(target(x), layer(x), rtol=0, atol=0)


def test_a_copy_follows():
    model, x = nn.Sequential(lively()), data(3, 11)
    other = copy.deepcopy(model)
    compressm.compress(model, compressm.FixedRank(4), calibration=[x], **CUT)
    follow(model, other)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_training_with_a_guard_and_an_average():
    """Cut, taken back, and cut again; the averaged copy turns like the model."""
    torch.manual_seed(0)
    model = nn.Sequential(lively(), nn.Linear(8, 8)).float().requires_grad_(True)
    average, optimizer = torch.optim.swa_utils.AveragedModel(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    turns, failing = model[0].rotary.inv_freq.clone(), [True]
    guard = compressm.Rollback(
        lambda model: float(failing[0] and model[0].head_k_dim < K), tolerance=0.1, jump=None, recovery=1, failures=3
    )  # fmt: skip
    compressor = compressm.Compressor(
        model, optimizer, policy=compressm.FixedRank(2), schedule=compressm.At([1, 4]), calibration=[data(4, 9).float()],
        guard=guard, ema=average, multiple_of=2,
    )  # fmt: skip
    ranks = []
    for step in range(8):
        x = data(4, 9, seed=step).float()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        compressor.step()
        ranks.append(model[0].head_k_dim)
        for part in (model[0], average.module[0]):
            assert set(part.rotary.inv_freq.tolist()) <= set(turns.tolist())
            assert part(x).isfinite().all()
        failing[0] = step < 2
        assert torch.equal(model[0].rotary.inv_freq, average.module[0].rotary.inv_freq)
    assert ranks == [2, K, K, K, 4, 4, 4, 4]  # half-way at last


def test_ranks_are_whole_pairs():
    layer, x = lively(), data(3, 11)
    for rank in (3, 1):
        for options in (CUT, {}):
            with pytest.raises(ArgumentError, match="rank: expected"):
                compressm.compress(layer, compressm.FixedRank(rank), calibration=[x], **options)
    assert layer.head_k_dim == K
    own = LinearAttention(8, 2, 1.5, decay="fixed", rotary=True)
    (report,) = compressm.compress(own, compressm.Energy(tau=0.3), calibration=[x.float()]).layers
    assert report.rank_after in (2, 4)
    assert len(own.inv_freq) == report.rank_after // 2
