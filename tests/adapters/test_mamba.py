"""Mamba layers as systems: moments against brute force, and edits that leave an ordinary layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compressm
from compressm.adapters import MambaAdapter, find_layers
from compressm.adapters.mamba import white_moments
from compressm.compression.planning.calibration import collect
from compressm.control import refitted_subset
from compressm.errors import ModelError, NumericalError
from compressm.kernels import selective_scan
from compressm.layers import Mamba

ADAPTER = MambaAdapter()


def lively(d_model=4, d_state=6, dtype=torch.float64, seed=0):
    """A layer whose scan matters: larger steps and selection weights than at initialisation."""
    torch.manual_seed(seed)
    layer = Mamba(d_model, d_state=d_state, expand=2).to(dtype)
    with torch.no_grad():
        layer.dt_proj.bias.add_(2.0)
        layer.x_proj.weight.mul_(3.0)
        layer.D.zero_()
    return layer


def scan_by_hand(layer, hidden):
    """h (batch, L, D, N), C and B (batch, L, N), dt (batch, L, D), one step at a time."""
    u, _ = layer.in_proj(hidden).chunk(2, -1)
    padded = F.pad(u, (0, 0, layer.d_conv - 1, 0))
    taps = layer.conv1d.weight[:, 0]
    u = F.silu(sum(padded[:, k : k + hidden.shape[1]] * taps[:, k] for k in range(layer.d_conv)) + layer.conv1d.bias)
    low, B, C = layer.x_proj(u).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    dt = F.softplus(layer.dt_proj(low))
    h, states = torch.zeros(hidden.shape[0], layer.d_inner, layer.d_state, dtype=hidden.dtype), []
    for t in range(hidden.shape[1]):
        h = torch.exp(dt[:, t, :, None] * -layer.A_log.exp()) * h + (dt * u)[:, t, :, None] * B[:, t, None]
        states.append(h)
    return torch.stack(states, 1), C, B, dt


def measure(layer, batches, **options):
    return collect(layer, {"": (layer, ADAPTER)}, batches, **options)[""]


def test_moments_are_those_of_the_states():
    layer, hidden = lively(), torch.randn(3, 11, 4, dtype=torch.float64)
    moments = measure(layer, [hidden[:2], hidden[2:]], rows_per_state=None)
    h, C, B, dt = scan_by_hand(layer, hidden)
    P = torch.einsum("btdn,btdm->nm", h, h) / 33
    assert moments.steps == 33
    torch.testing.assert_close(moments.P, P, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.Q, torch.einsum("btn,btm->nm", C, C) / 33, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.mean.B, torch.einsum("btd,btn->dn", dt, B) / 33)
    lam = torch.exp(dt[..., None] * -layer.A_log.exp()).mean((0, 1))
    torch.testing.assert_close(moments.mean.log_lam, lam.log(), rtol=1e-6, atol=1e-9)


def test_steps_are_sampled_evenly():
    layer, hidden = lively(), torch.randn(8, 40, 4, dtype=torch.float64)
    every, some = (measure(layer, [hidden], rows_per_state=rows) for rows in (None, 10))
    assert every.steps == 320
    assert 56 <= some.steps <= 80
    assert (some.P - every.P).norm() < 0.3 * every.P.norm()


def test_white_moments():
    """Against a long scan of white noise with the constant step sizes of the bias."""
    layer = lively()
    parameters = {key: layer.get_parameter(key) for key in ("x_proj.weight", "A_log")}
    white = white_moments({**parameters, "dt_bias": layer.dt_proj.bias})
    A, dt = -layer.A_log.exp(), F.softplus(layer.dt_proj.bias)
    W = layer.x_proj.weight.detach()
    B, C = W[-12:-6], W[-6:]
    lam, brute = torch.exp(dt[:, None] * A), torch.zeros(6, 6, dtype=torch.float64)
    for d in range(8):
        drive = dt[d] * B  # dt B_t x_t with B_t = W_B x_t; x_t x_td has the second moment of W_B for independent entries
        K = 1 / (1 - lam[d][:, None] * lam[d][None, :])
        brute += (drive @ drive.T) * K
    torch.testing.assert_close(white.P, brute.detach())
    torch.testing.assert_close(white.Q, C @ C.T)
    assert white.steps == 0


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_edited_layer_is_the_reduced_scan(rank):
    layer, hidden = lively().requires_grad_(False), torch.randn(4, 30, 4, dtype=torch.float64)
    moments = measure(layer, [hidden], rows_per_state=None)
    reduction = refitted_subset(moments, rank)
    small = copy.deepcopy(layer)
    compressm.compress(small, compressm.FixedRank(rank), calibration=[hidden])
    assert small.d_state == rank
    assert small.x_proj.out_features == small.x_proj.weight.shape[0] == 1 + 2 * rank
    h, C, _, _ = scan_by_hand(layer, hidden)
    y = torch.einsum("btdn,btn->btd", h[..., reduction.states], C @ reduction.mix.T)
    expected = layer.out_proj(y * F.silu(layer.in_proj(hidden).chunk(2, -1)[1]))
    torch.testing.assert_close(small(hidden), expected, rtol=1e-4, atol=1e-5)
    full = torch.einsum("btdn,btn->btd", h, C)
    assert reduction.output_error == pytest.approx(float((y - full).norm() / full.norm()), rel=1e-4)


def test_a_full_cut_of_redundant_states_changes_nothing():
    layer, hidden = lively(), torch.randn(4, 30, 4, dtype=torch.float64)
    with torch.no_grad():  # states 3..5 copy states 0..2
        layer.A_log[:, 3:] = layer.A_log[:, :3]
        layer.x_proj.weight[-9:-6] = layer.x_proj.weight[-12:-9]
    before = layer(hidden)
    report = compressm.compress(layer, compressm.FixedRank(3), calibration=[hidden])
    torch.testing.assert_close(layer(hidden), before, rtol=1e-2, atol=1e-3 * before.abs().max().item())
    assert report.layers[0].output_error < 2e-3
    assert report.layers[0].convention == "selective"
    assert report.layers[0].gramians == "data"


def test_refitted_beats_the_paper_s_subset():
    hidden = torch.randn(8, 40, 4, dtype=torch.float64)
    errors = []
    for recipe in ("default", "paper"):
        layer = lively()
        report = compressm.compress(layer, compressm.FixedRank(2), calibration=[hidden], recipe=recipe)
        errors.append(report.layers[0].output_error)
    assert errors[0] < errors[1]


def test_data_free_and_inspect():
    layer = lively()
    inspection = compressm.inspect(layer)
    kinds = [(s.convention, s.gramians) for s in inspection.layers[0].spectra]
    assert kinds == [("selective", "data-free"), ("mean-LTI", "data-free")]
    assert all(spectrum.error_bounds is None for spectrum in inspection.layers[0].spectra)
    assert 0 < inspection.layers[0].slowest < 1
    report = compressm.compress(layer, compressm.FixedRank(2))
    assert layer(torch.randn(1, 5, 4, dtype=torch.float64)).isfinite().all()
    assert report.layers[0].output_error is None


def test_energy_counts_one_state_per_value():
    layer, hidden = lively(), [torch.randn(8, 40, 4, dtype=torch.float64)]
    spectrum = compressm.inspect(layer, hidden).layers[0].spectra[0]
    hsv = torch.tensor(spectrum.hsv)
    kept = int((hsv.flip(0).cumsum(0).flip(0) > 0.1 * hsv.sum()).sum())
    assert len(hsv) == 6
    assert spectrum.ranks[0.1] == kept
    report = compressm.compress(layer, compressm.Energy(tau=0.1), calibration=hidden)
    assert report.ranks == {"": kept if kept < 0.95 * 6 else 6}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [6, 2])
def test_state_bytes_are_those_of_the_cache(dtype, rank):
    layer = Mamba(4, d_state=6, d_conv=3, expand=3).to(dtype)
    said = ADAPTER.state_bytes(layer, rank)
    compressm.compress(layer, compressm.FixedRank(rank))
    assert layer.d_state == rank
    assert said == ADAPTER.state_bytes(layer, rank) == sum(part.nbytes for part in layer.allocate_inference_cache(1))


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("convention", ["real", "complex"])
def test_nothing_bounds_the_error_of_a_selective_layer(convention, measured):
    layer = lively()
    moments = measure(layer, [torch.randn(2, 9, 4, dtype=torch.float64)]) if measured else None
    assert not ADAPTER.analyse(layer, "", convention, moments).bounded
    assert not ADAPTER.bounded(convention, measured)


class Foreign(nn.Module):
    """A mixer that keeps its sizes in attributes, as mamba_ssm's and transformers' do."""

    def __init__(self, attribute):
        super().__init__()
        inner = lively()
        setattr(self, attribute, inner.d_state)
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.A_log, self.D = inner.A_log, inner.D
        self.attribute, self.dt_rank = attribute, inner.dt_rank

    def forward(self, hidden_states, cache_params=None):
        size = getattr(self, self.attribute)
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        x = F.silu(self.conv1d(x.mT)[..., : x.shape[1]])
        dt, B, C = self.x_proj(x.mT).split([self.dt_rank, size, size], -1)
        y = selective_scan(
            x, F.linear(dt, self.dt_proj.weight).mT, -self.A_log.exp(), B.mT, C.mT, self.D, z.mT, self.dt_proj.bias, True
        )
        return self.out_proj(y.mT)


@pytest.mark.parametrize("attribute", ["d_state", "ssm_state_size"])
def test_foreign_mixers_get_their_attributes(attribute):
    compressm.register_adapter(Foreign, ADAPTER)
    layer, hidden = Foreign(attribute), torch.randn(4, 30, 4, dtype=torch.float64)
    own, average = lively(), torch.optim.swa_utils.AveragedModel(layer)
    compressm.compress(own, compressm.FixedRank(3), calibration=[hidden])
    compressm.compress(layer, compressm.FixedRank(3), calibration=[hidden], ema=average)
    assert getattr(layer, attribute) == 3
    assert ADAPTER.state_bytes(layer, 3) == ADAPTER.state_bytes(own, 3)
    torch.testing.assert_close(layer(hidden), own(hidden))
    torch.testing.assert_close(average(hidden), own(hidden))
    assert average.module.x_proj.out_features == 7


def test_names_of_other_libraries_are_registered():
    supported = compressm.adapters.supported_layers()
    assert "mamba_ssm.modules.mamba_simple.Mamba" in supported
    assert "transformers.models.mamba.modeling_mamba.MambaMixer" in supported
    assert isinstance(find_layers(nn.Sequential(Mamba(4)))["0"][1], MambaAdapter)


def test_wrong_layers_are_refused():
    layer = lively()
    with torch.no_grad():
        layer.A_log[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="A_log holds 1 NaN"):
        compressm.compress(layer, compressm.FixedRank(2))
    layer = lively()
    layer.x_proj.bias = nn.Parameter(torch.zeros(13, dtype=torch.float64))
    with pytest.raises(ModelError, match="x_proj has a bias"):
        compressm.compress(layer, compressm.FixedRank(2))
