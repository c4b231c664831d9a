"""Trees to JSON and tensors, and back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressm.compression.common.codec import MARKERS, decode, encode, to_storable
from compressm.errors import CheckpointError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]
tensors = st.builds(
    lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype),
    st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES), st.integers(0, 9),
)  # fmt: skip
text = st.text(max_size=5) | st.sampled_from([*sorted(MARKERS), "a", "a/b", "b", "1", "tree", "a#1"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | text | tensors
keys = text | st.integers(-2, 2)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=15,
)


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        equal = isinstance(right, torch.Tensor) and left.dtype == right.dtype and left.shape == right.shape
        return equal and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return (left == right and math.copysign(1, left) == math.copysign(1, right)) or (left != left and right != right)
    return left == right


@given(trees)
def test_round_trip(tree):
    stored: dict[str, torch.Tensor] = {}
    manifest = json.loads(json.dumps(encode(tree, "tree", stored), allow_nan=False))
    storable, complex_names = to_storable(stored)
    loaded = {name: torch.view_as_complex(value) if name in complex_names else value for name, value in storable.items()}
    assert same(decode(manifest, loaded), tree)


def test_tensors_of_one_name_stay_apart():
    tree = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    stored: dict[str, torch.Tensor] = {}
    node = encode(tree, "t", stored)
    assert len(stored) == 4
    assert same(decode(node, stored), tree)
    assert not stored, "every tensor is handed out once"


def test_storable_tensors_are_contiguous_and_apart():
    base = torch.arange(6.0)
    given_tensors = {"whole": base, "part": base[2:4], "turned": base.view(2, 3).T, "again": base}
    given_tensors["conj"] = torch.complex(base, -base).conj()
    storable, complex_names = to_storable(given_tensors)
    assert complex_names == ["conj"]
    storages = [value.untyped_storage().data_ptr() for value in storable.values()]
    assert len(set(storages)) == len(storages)
    for name, value in storable.items():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes
        oracle = given_tensors[name]
        assert torch.equal(value, torch.view_as_real(oracle.resolve_conj()) if name == "conj" else oracle)


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"a": [1, {2, 3}]}, "extra/a/1: got set, expected None, bool"),
        ({"a": object()}, "extra/a: got object"),
        ({(1, 2): 3}, "extra: a dict key is neither str nor int"),
        ({True: 3}, "extra: a dict key is neither str nor int"),
        (1j, "extra: got complex"),
    ],
)
def test_what_cannot_be_stored_is_named(tree, match):
    with pytest.raises(CheckpointError, match=match):
        encode(tree, "extra", {})


def test_sparse_tensors_are_refused():
    with pytest.raises(CheckpointError, match=r"x: got a torch\.sparse_coo tensor, expected a dense one"):
        to_storable({"x": torch.eye(2).to_sparse()})


@pytest.mark.parametrize(
    "node",
    [{"!tensor": "gone"}, {"!tensor": 3}, {"!tuple": {}}, {"!float": "1e3"}, {"!dict": [[1]]}, {"!dict": [[None, 1]]}],
)
def test_malformed_markers(node):
    with pytest.raises(CheckpointError, match="manifest: malformed entry !"):
        decode({"deep": [node]}, {})
