"""The decode step with heads, groups, tied parameters and rows of a pool, on every backend against its definition."""

from __future__ import annotations

import pytest
import torch
from kernels.evaluation import check_threads
from torch.nn import functional as F

from compressm.errors import ArgumentError
from compressm.kernels import selective_state_update
from compressm.kernels.core import cpp
from compressm.kernels.selective_scan import cpu
from compressm.kernels.selective_state_update import triton_update

BACKENDS = ("reference", "cpp", "triton")
SIZES = [(3, 4, 8, 16, 2), (2, 3, 5, 7, 3), (1, 1, 17, 1, 1), (2, 6, 1, 33, 2), (2, 2, 40, 128, 1)]


def random_inputs(batch, heads, width, states, groups, *, tied=False, pool=None, bare=False):
    """Float64 arguments by name, exact in float32; tied: A, dt and dt_bias are one number a head, expanded."""

    def normal(*shape):
        return torch.randn(shape).double()

    rates, dt, bias = -torch.rand(heads, width, states).double(), normal(batch, heads, width), normal(heads, width) - 2.0
    if tied:
        rates, dt = rates[:, :1, :1].expand(-1, width, states), dt[..., :1].expand(-1, -1, width)
        bias = bias[:, :1].expand(-1, width)
    optional = {} if bare else {"D": normal(heads, width), "z": normal(batch, heads, width), "dt_bias": bias}
    return {
        "state": normal(pool or batch, heads, width, states), "x": normal(batch, heads, width), "dt": dt, "A": rates,
        "B": normal(batch, groups, states), "C": normal(batch, groups, states), **optional,
    }  # fmt: skip


def narrow(tensors, dtype=torch.float32, device="cpu"):
    """The tensors in another dtype; one that is expanded stays so."""
    return {name: t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())].to(device, dtype).expand(t.shape)
            for name, t in tensors.items()}  # fmt: skip


def by_definition(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=True):
    """(output, new state) head by head."""
    outs, news = [], []
    for head in range(state.shape[1]):
        group = head // (state.shape[1] // B.shape[1])
        gain = dt[:, head] if dt_bias is None else dt[:, head] + dt_bias[head]
        gain = F.softplus(gain) if dt_softplus else gain
        new = (gain[..., None] * A[head]).exp() * state[:, head]
        new = new + torch.einsum("bp,bp,bn->bpn", gain, x[:, head], B[:, group])
        out = torch.einsum("bpn,bn->bp", new, C[:, group])
        out = out if D is None else out + D[head] * x[:, head]
        outs.append(out if z is None else out * F.silu(z[:, head]))
        news.append(new)
    return torch.stack(outs, 1), torch.stack(news, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_heads_and_groups(assert_close, device, backend, sizes, tied, bare):
    inputs = random_inputs(*sizes, tied=tied, bare=bare)
    for softplus in (True, False):
        out, new = by_definition(**inputs, dt_softplus=softplus)
        place = device if backend == "triton" else "cpu"
        given = narrow(inputs, torch.float64 if backend == "reference" else torch.float32, place)
        result = selective_state_update(**given, dt_softplus=softplus, backend=backend)
        assert_close(result.cpu(), out, "out")
        assert_close(given["state"].cpu(), new, "state")


@pytest.mark.parametrize("tied", [False, True])
def test_every_instruction_set(assert_close, isa, tied):
    for sizes in SIZES:
        inputs = random_inputs(*sizes, tied=tied)
        out, new = by_definition(**inputs)
        given = narrow(inputs)
        assert_close(selective_state_update(**given, dt_softplus=True, backend="cpp"), out, "out")
        assert_close(given["state"], new, "state")


def test_tied_parameters_are_recognised_in_memory(monkeypatch):
    seen = []
    launch = triton_update._selective_state_update_kernel

    class Watched:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((options["TIED"], args[4].numel())) or launch[grid](*args, **options)

    monkeypatch.setattr(triton_update, "_selective_state_update_kernel", Watched())
    for tied in (True, False):
        inputs = narrow(random_inputs(2, 3, 4, 5, 1, tied=tied))
        selective_state_update(**inputs, dt_softplus=True, backend="triton")
    same = {name: t.contiguous() for name, t in narrow(random_inputs(2, 3, 4, 5, 1, tied=True)).items()}
    selective_state_update(**same, dt_softplus=True, backend="triton")
    assert seen == [(True, 3), (False, 60), (False, 60)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_parameters_are_never_expanded(dtype):
    heads, width, states = 4, 64, 128
    inputs = narrow(random_inputs(1, heads, width, states, 1, tied=True), dtype)
    inputs["state"] = inputs["state"].float()
    with torch.profiler.profile(profile_memory=True) as recorded:
        selective_state_update(**inputs, dt_softplus=True, backend="cpp")
    most = max(event.cpu_memory_usage for event in recorded.key_averages())
    assert most < heads * width * states  # bytes: a quarter of A's, written out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [True, False])
def test_rows_of_a_pool(assert_close, device, backend, dtype, heads):
    place = device if backend == "triton" else "cpu"
    for pad, indices, targets in (
        (-1, [5, 0, 3], None),
        (-1, [5, -1, 3], None),
        (0, [5, 0, -7], None),
        (99, [99, 99, 99], None),
        (-1, [5, 0, 3], [1, 2, 3]),
        (-1, [5, 0, 3], [0, 3, 5]),  # what one entry writes, another one reads
        (-1, [5, 5, 3], [1, 2, -1]),
        (-1, None, [2, 0, 1]),
    ):
        inputs = random_inputs(3, 4, 8, 16, 2, tied=True, pool=3 if indices is None else 7)
        inputs = {name: t.to(dtype).double() for name, t in inputs.items()}
        if not heads:
            flat = {name: t.flatten(1, 2) for name, t in inputs.items() if name in ("state", "x", "dt", "z")}
            flat |= {name: inputs[name].flatten(0, 1) for name in ("A", "D", "dt_bias")}
        read = [0, 1, 2] if indices is None else indices
        written = read if targets is None else targets
        valid = [row >= 0 and row != pad for row in read]
        picked = inputs["state"][[row if ok else 0 for row, ok in zip(read, valid, strict=True)]]
        out, new = by_definition(**{**inputs, "state": picked})
        after = inputs["state"].clone()
        for row, ok, state in zip(written, valid, new, strict=True):
            if ok and row >= 0 and row != pad:
                after[row] = state
        out[[not ok for ok in valid]] = 0.0
        given = narrow(inputs if heads else {**inputs, **flat}, dtype, place)
        rows = [None if t is None else torch.tensor(t, dtype=torch.int32, device=place) for t in (indices, targets)]
        result = selective_state_update(
            **given, dt_softplus=True, state_batch_indices=rows[0], dst_state_batch_indices=rows[1], pad_slot_id=pad,
            backend=backend,
        )  # fmt: skip
        assert result.dtype == given["state"].dtype == dtype
        if any(valid):
            assert_close(result.cpu().unflatten(1, (4, -1)) if not heads else result.cpu(), out, "out", dtype)
        else:
            assert not result.any()
        assert_close(given["state"].cpu().view(after.shape), after, "state", dtype)
        untouched = [row for row in range(len(after)) if row not in written]
        before = inputs["state"].to(dtype)[untouched]
        assert torch.equal(given["state"].cpu().view(after.shape)[untouched], before)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_any_strides_of_the_state(assert_close, device, backend):
    inputs = random_inputs(2, 4, 6, 5, 2)
    out, new = by_definition(**inputs)
    for order in ((0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3)):
        given = narrow(inputs, device=device if backend == "triton" else "cpu")
        back = tuple(order.index(axis) for axis in range(4))
        given["state"] = given["state"].permute(order).contiguous().permute(back)
        result = selective_state_update(**given, dt_softplus=True, backend=backend)
        assert_close(result.cpu(), out, "out")
        assert_close(given["state"].cpu(), new, f"state {order}")


def test_a_pool_is_advanced_where_it_lies():
    """No copy of the states is made, whatever part of a wider tensor the pool is."""
    inputs = narrow(random_inputs(2, 4, 32, 64, 1))
    memory = torch.randn(50, 6, 32, 64)
    inputs["state"] = memory[:, 1:5]
    with torch.profiler.profile(profile_memory=True) as recorded:
        rows = torch.tensor([40, 7])
        selective_state_update(**inputs, dt_softplus=True, state_batch_indices=rows, backend="cpp")
    assert max(event.cpu_memory_usage for event in recorded.key_averages()) < inputs["state"][:2].nbytes // 4


def test_same_bits_for_any_thread_count():
    inputs, rows = random_inputs(40, 8, 32, 48, 2, pool=60), torch.randperm(60)[:40]

    def advanced():
        given = {name: t.clone() for name, t in narrow(inputs).items()}
        out = selective_state_update(**given, dt_softplus=True, state_batch_indices=rows, backend="cpp")
        return {"out": out, "state": given["state"]}

    check_threads(advanced)


@pytest.mark.parametrize("options", [{}, {"indices": [4, -1]}, {"indices": [4, 0], "targets": [0, 1]}], ids=str)
def test_gradients_of_everything(options):
    inputs = random_inputs(2, 2, 2, 3, 1, pool=5 if options else None)
    names = list(inputs)
    rows = [torch.tensor(options[key]) if key in options else None for key in ("indices", "targets")]

    def call(*tensors):
        given = dict(zip(names, tensors, strict=True))
        given["state"] = given["state"].clone()
        out = selective_state_update(
            **given, dt_softplus=True, state_batch_indices=rows[0], dst_state_batch_indices=rows[1]
        )
        return out, given["state"]

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs.values()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4, 1), (2, 0, 3, 4, 1), (2, 2, 0, 4, 1), (2, 2, 3, 0, 1)], ids=str)
def test_empty_sizes(device, backend, sizes):
    inputs = narrow(random_inputs(*sizes), device=device if backend == "triton" else "cpu")
    out = selective_state_update(**inputs, dt_softplus=True, backend=backend)
    expected = inputs["D"] * inputs["x"] * F.silu(inputs["z"])
    torch.testing.assert_close(out, expected)


def test_the_op_is_well_formed_and_compiles(assert_close):
    inputs = narrow(random_inputs(2, 4, 3, 5, 2, tied=True, pool=6))
    rows, targets = torch.tensor([5, 1]), torch.tensor([5, -1])
    op, arguments = torch.ops.compressm.selective_state_update.default, (*inputs.values(), rows, targets, True, -1, "cpp")
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    state = inputs["state"].clone()
    options = {"dt_softplus": True, "state_batch_indices": rows}
    expected = selective_state_update(**{**inputs, "state": state}, **options)
    compiled = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, **options), expected)
    assert torch.equal(inputs["state"], state)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("state", lambda t: t[0, 0]),
        ("x", lambda t: t[:, 1:]),
        ("dt", lambda t: t[..., 0]),
        ("A", lambda t: t[..., 1:]),
        ("B", lambda t: t[:, :1].repeat(1, 3, 1)),
        ("C", lambda t: t[:, :1]),
        ("D", lambda t: t[1:]),
        ("z", lambda t: t[..., 1:]),
        ("dt_bias", lambda t: t[:, 0]),
        ("state_batch_indices", lambda t: torch.tensor([0])),
        ("state_batch_indices", lambda t: torch.tensor([0, 2])),
        ("state_batch_indices", lambda t: torch.tensor([0.0, 1.0])),
        ("dst_state_batch_indices", lambda t: torch.tensor([0, 5])),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    inputs = random_inputs(2, 4, 3, 5, 2)
    inputs[name] = wrong(inputs.get(name))
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        selective_state_update(**inputs)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("state", lambda t: t[0]),
        ("state", lambda t: t.double()),
        ("state", lambda t: t[:1]),
        ("x", lambda t: t[:, 1:]),
        ("dt", lambda t: t[..., 1:]),
        ("A", lambda t: t[..., 1:]),
        ("A", lambda t: t.long()),
        ("B", lambda t: t[:, :0]),
        ("C", lambda t: t[1:]),
        ("D", lambda t: t[1:]),
        ("z", lambda t: t[1:]),
        ("dt_bias", lambda t: t[1:]),
    ],
)
def test_the_raw_op_takes_no_short_operand(name, wrong):
    inputs = narrow(random_inputs(2, 4, 3, 5, 2))
    inputs[name] = wrong(inputs[name])
    with pytest.raises(RuntimeError, match="expected"):
        cpp.library().selective_step(*inputs.values(), None, None, True, -1)
    for rows in (torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises((RuntimeError, ValueError), match="state_batch_indices: expected"):
            cpp.library().selective_step(*narrow(random_inputs(2, 4, 3, 5, 2)).values(), rows, None, True, -1)


def test_a_call_goes_to_the_backend_that_is_named(monkeypatch):
    seen = []
    for module in (cpu, triton_update):
        inner = module.state_update
        monkeypatch.setattr(module, "state_update", lambda *a, m=module.__name__, f=inner: seen.append(m) or f(*a))
    inputs = narrow(random_inputs(2, 4, 3, 5, 2))
    for backend in (None, "cpp", "triton"):
        selective_state_update(**inputs, backend=backend)
    assert [name.rpartition(".")[2] for name in seen] == ["cpu", "cpu", "triton_update"]


def test_states_that_share_their_memory_are_refused(device):
    inputs = narrow(random_inputs(2, 2, 3, 4, 1), device=device)
    inputs["state"] = inputs["state"][:1].expand_as(inputs["state"])
    with pytest.raises(ArgumentError, match="share their memory"):
        selective_state_update(**inputs, dt_softplus=True, backend="triton")
