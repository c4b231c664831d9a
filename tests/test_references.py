"""compressm.citation()."""

from __future__ import annotations

import re

import pytest
import torch

import compressm
from compressm import references
from compressm.adapters.registry import _ADAPTERS
from compressm.errors import ArgumentError


def keys(capsys):
    return re.findall(r"^@\w+\{(\w+),$", capsys.readouterr().out, re.MULTILINE)


def test_software_and_method_come_first_and_what_was_used_follows(capsys):
    compressm.citation()
    assert keys(capsys) == ["compressm", "chahine2026compressm"]
    model = torch.nn.Sequential(compressm.layers.LRU(4, 3), compressm.layers.LRU(4, 3), compressm.layers.Mamba(4, d_state=3))
    compressor = compressm.Compressor(model, None, policy=compressm.FixedRank(2), schedule=compressm.At([1]))
    expected = ["compressm", "chahine2026compressm", "orvieto2023resurrecting", "gu2023mamba"]
    for used in ((model,), (compressor,), (model[0], model[2])):
        compressm.citation(*used)
        assert keys(capsys) == expected
    with pytest.raises(ArgumentError, match="used: expected models or Compressors, got str"):
        compressm.citation("LRU")


def test_every_adapter_names_entries_that_there_are():
    known = references.entries()
    assert len(known) >= 9
    for name, adapter in _ADAPTERS.items():
        if name.startswith(("compressm.", "mamba_ssm.", "transformers.")) and adapter is not None:
            assert adapter.papers, name
            assert set(adapter.papers) <= set(known), name


def test_entries_are_whole():
    for key, entry in references.entries().items():
        assert entry.count("{") == entry.count("}"), key
        assert {"title", "author", "year"} <= set(re.findall(r"^  (\w+) *=", entry, re.MULTILINE)), key
