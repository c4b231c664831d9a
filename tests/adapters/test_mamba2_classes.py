"""Mamba-2 mixers of other libraries: every class that the registry names."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from adapters.mamba2_layers import data, lively
from torch import nn

import compressm
from compressm.adapters import Mamba2Adapter, find_layers
from compressm.compression.planning.calibration import collect
from compressm.errors import ArgumentError, ModelError
from compressm.integrations.mamba_ssm import stand_in_for_the_extension

ADAPTER = Mamba2Adapter()
SIZES = {"mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 16, "mamba_n_groups": 2}
HYBRIDS = {
    "mamba2.modeling_mamba2.Mamba2Mixer": (
        "Mamba2Config", {"num_heads": 4, "head_dim": 4, "state_size": 16, "n_groups": 2, "expand": 2}
    ),
    "bamba.modeling_bamba.BambaMixer": ("BambaConfig", SIZES),
    "falcon_h1.modeling_falcon_h1.FalconH1Mixer": ("FalconH1Config", {"mamba_d_ssm": 16, **SIZES}),
    "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": ("GraniteMoeHybridConfig", SIZES),
    "nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": (
        "NemotronHConfig", {"mamba_num_heads": 4, "mamba_head_dim": 4, "ssm_state_size": 16, "n_groups": 2}
    ),
    "zamba2.modeling_zamba2.Zamba2MambaMixer": (
        "Zamba2Config",
        {
            "n_mamba_heads": 4, "mamba_headdim": 4, "mamba_d_state": 16, "mamba_ngroups": 2,
            "layers_block_type": ["mamba"],
        },
    ),
}  # fmt: skip


def mixer(name, **options):
    """A mixer of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    config_name, sizes = HYBRIDS[name]
    module, _, kind = f"transformers.models.{name}".rpartition(".")
    config = getattr(transformers, config_name)(hidden_size=8, num_hidden_layers=1, **{**sizes, **options})
    torch.manual_seed(0)
    layer = getattr(importlib.import_module(module), kind)(config, layer_idx=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.A_log.sub_(2.0)
    if name.startswith("falcon"):
        layer.ssm_in_multiplier = 0.6
        multipliers = torch.tensor([0.5, 2.0, 0.7, 1.3, 0.9])
        sizes = torch.tensor([16, 16, 32, 32, 4])
        layer.register_buffer("mup_vector", multipliers.repeat_interleave(sizes)[None, None], persistent=False)
    return layer


@pytest.mark.parametrize("name", HYBRIDS)
def test_mixers_of_transformers(name):
    layer, hidden = mixer(name).requires_grad_(False), data(3, 12).float()
    with torch.no_grad():  # the last channels of C in both groups
        layer.conv1d.weight[48:].view(2, 16, -1)[:, 12:] = 0
        if layer.conv1d.bias is not None:
            layer.conv1d.bias[48:].view(2, 16)[:, 12:] = 0
    before = layer(hidden)
    full, average = copy.deepcopy(layer), torch.optim.swa_utils.AveragedModel(layer)
    mask = torch.ones(3, 12)
    mask[0, :5] = 0
    report = compressm.compress(layer, compressm.FixedRank(12), calibration=[hidden], refine=0, ema=average)
    assert report.layers[0].output_error < 1e-4
    assert layer.ssm_state_size == 12
    assert layer.conv_dim == layer.conv1d.groups == layer.conv1d.weight.shape[0] == 64
    torch.testing.assert_close(layer(hidden), before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    torch.testing.assert_close(average(hidden), layer(hidden))
    torch.testing.assert_close(layer(hidden, attention_mask=mask), full(hidden, attention_mask=mask), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["bamba.modeling_bamba.BambaMixer", "falcon_h1.modeling_falcon_h1.FalconH1Mixer"])
def test_what_is_read_is_what_the_mixer_does(name, monkeypatch):
    """Inputs of the library's own scan against those that the meter looks at, padding included."""
    layer, hidden = mixer(name).requires_grad_(False), data(2, 9).float()
    library = importlib.import_module(type(layer).__module__)
    scan, seen = library.mamba2_chunk_scan, {}

    def spy(x, dt, A, B, C, **options):
        seen.update(x=x, dt=nn.functional.softplus(dt + options["dt_bias"]), A=A, B=B, C=C)
        return scan(x, dt, A, B, C, **options)

    monkeypatch.setattr(library, "mamba2_chunk_scan", spy)
    mask = torch.ones(2, 9)
    mask[1, :3] = 0

    def forward(model, batch):
        return model(batch, attention_mask=mask)

    moments = collect(layer, {"": (layer, ADAPTER)}, [hidden], forward=forward, rows_per_state=None)[""]
    for letter, moment in (("B", moments.P), ("C", moments.Q)):
        rows = seen[letter][mask.bool()].double()
        torch.testing.assert_close(moment, torch.einsum("tgn,tgm->gnm", rows, rows) / 15, rtol=1e-5, atol=1e-5)
    S, Z = torch.zeros(2, 4, 16, 4), torch.zeros(2, 16, 16)
    for t in range(9):
        keys, queries = (seen[letter][:, t].repeat_interleave(2, 1)[..., None] for letter in ("B", "C"))
        decay = torch.exp(seen["dt"][:, t] * seen["A"])[..., None, None]
        S = decay * S + keys * (seen["dt"][:, t, :, None] * seen["x"][:, t])[:, :, None]
        z = (queries * S).unflatten(1, (2, 2))[mask[:, t].bool()]
        Z += torch.einsum("bghnp,bghmp->gnm", z, z) / 15
    torch.testing.assert_close(moments.Z, Z.double(), rtol=1e-4, atol=1e-4)


def test_ranks_that_kernels_cannot_run_are_refused():
    name = "mamba2.modeling_mamba2.Mamba2Mixer"
    layer = mixer(name, num_heads=8, head_dim=2)
    with pytest.raises(
        ArgumentError, match=r"layer '': rank: expected a multiple of 2.*got 7.*44 channels of conv1d.*multiple_of=1"
    ):
        compressm.compress(layer, compressm.FixedRank(7), calibration=[data(2, 9).float()])
    assert layer.ssm_state_size == 16
    for rank, options in ((14, {}), (7, {"multiple_of": 1})):
        compressm.compress(layer, compressm.FixedRank(rank), calibration=[data(2, 9).float()], **options)
        assert layer.ssm_state_size == rank
    odd = mixer(name, num_heads=4, head_dim=4)  # 84 rows: never ran on those kernels' fast path
    compressm.compress(odd, compressm.FixedRank(8), calibration=[data(2, 9).float()])
    with pytest.raises(ArgumentError, match="channels of conv1d"):
        compressm.compress(odd, compressm.FixedRank(7), calibration=[data(2, 9).float()])


def test_ranks_of_foreign_layers_are_multiples_of_sixteen():
    name = "mamba2.modeling_mamba2.Mamba2Mixer"
    for options, expected in (({}, 32), ({"multiple_of": 4}, 20)):
        layer = mixer(name, state_size=40)
        compressm.compress(layer, compressm.Shrink(0.5), calibration=[data(2, 9).float()], **options)
        assert layer.ssm_state_size == expected
    own = lively(d_state=40)
    compressm.compress(own, compressm.Shrink(0.5), calibration=[data(2, 9)])
    assert own.d_state == 20


def test_one_multiplier_for_all_channels_is_needed():
    layer = mixer("falcon_h1.modeling_falcon_h1.FalconH1Mixer")
    layer.mup_vector[..., 40] = 3
    with pytest.raises(ModelError, match="mup_vector differs"):
        compressm.compress(layer, compressm.FixedRank(8), calibration=[data(2, 9).float()])
    assert layer.ssm_state_size == 16


def test_all_classes_are_registered():
    supported = compressm.adapters.supported_layers()
    for name in HYBRIDS:
        assert f"transformers.models.{name}" in supported
    assert {"mamba_ssm.modules.mamba2.Mamba2", "mamba_ssm.modules.mamba2_simple.Mamba2Simple"} <= set(supported)
    assert isinstance(find_layers(nn.Sequential(lively()))["0"][1], Mamba2Adapter)


@pytest.mark.parametrize("kind", ["Mamba2", "Mamba2Simple"])
def test_layers_of_mamba_ssm(kind):
    """Their kernels need a GPU: reading and editing do not run them, and ours with the same weights is reduced alike."""
    stand_in_for_the_extension()
    pytest.importorskip("mamba_ssm")
    theirs_of = importlib.import_module(f"mamba_ssm.modules.{'mamba2' if kind == 'Mamba2' else 'mamba2_simple'}")
    own = lively(d_state=12, dtype=torch.float32, ngroups=1)
    theirs = getattr(theirs_of, kind)(8, d_state=12, headdim=4)
    theirs.load_state_dict(own.state_dict())
    average = torch.optim.swa_utils.AveragedModel(theirs)
    for layer, options in ((own, {"form": "strict"}), (theirs, {"ema": average})):
        compressm.compress(layer, compressm.FixedRank(8), **options)
    assert theirs.d_state == average.module.d_state == 8
    assert theirs.conv1d.groups == 32
    for name, value in own.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value)
        assert torch.equal(average.module.state_dict()[name], value)
