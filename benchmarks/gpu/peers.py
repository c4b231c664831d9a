"""Selective scans of others, on the arguments of our launches: mamba_ssm's CUDA kernels where they are, and torch.compile."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from gpu.session import Session

EXTENSION = "selective_scan_cuda"
BUILD = Path(tempfile.gettempdir()) / "compressm_peers" / EXTENSION
UNROLL = 8
Call = Callable[[], object]


def build_mamba(source: Path) -> Path:
    """Compile the selective scan of a checkout of mamba_ssm for this device into BUILD; takes minutes."""
    from torch.utils import cpp_extension

    files = sorted(str(path) for path in (source / "csrc" / "selective_scan").glob("*.c*") if path.suffix in (".cpp", ".cu"))
    if not files:
        raise FileNotFoundError(f"{source}/csrc/selective_scan: no sources there")
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    BUILD.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda",
             "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__",
             "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__"]  # fmt: skip
    cpp_extension.load(
        EXTENSION, files, extra_cuda_cflags=flags, extra_cflags=["-O3", "-std=c++17"], build_directory=str(BUILD),
        extra_include_paths=[str(source / "csrc" / "selective_scan")], verbose=True,
    )  # fmt: skip
    return BUILD


def mamba_extension(session: Session) -> tuple[Any, str]:
    """(mamba_ssm's extension module or None, why not)."""
    if session.device != "cuda":
        return None, "it needs a GPU"
    if BUILD.exists() and str(BUILD) not in sys.path:
        sys.path.append(str(BUILD))
    try:
        return importlib.import_module(EXTENSION), ""
    except ImportError as error:
        return None, f"{EXTENSION} cannot be imported ({error}); --build-mamba DIR compiles it"


def mamba_calls(extension: Any, arguments: tuple[Any, ...], weight: Tensor) -> tuple[Call, Call, Tensor]:
    """(forward, backward, output) of mamba_ssm on the arguments of our launch."""
    u, delta, A, B, C, D, z, bias = arguments[:8]

    def forward() -> list[Tensor]:
        return extension.fwd(u, delta, A, B, C, D, z, bias, True)

    out, x, *rest = forward()

    def backward() -> list[Tensor]:
        return extension.bwd(u, delta, A, B, C, D, z, bias, weight, x, out, None, True, False)

    return forward, backward, rest[0]


def _steps(h: Tensor, dt: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    outputs = []
    for t in range(dt.shape[0]):
        h = torch.exp(dt[t][..., None] * A) * h + drive[t][..., None] * B[t][:, None]
        outputs.append((h * C[t][:, None]).sum(-1))
    return h, tuple(outputs)


def _prepared(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    u, delta, _, B, C, _, _, bias = arguments[:8]
    dt = softplus(delta.float() + bias[:, None])
    return dt, dt * u, B[:, 0].float(), C[:, 0].float()


def _finished(y: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    u, *_, D, z, _ = arguments[:8]
    return ((y + D[:, None] * u) * silu(z.float())).to(u.dtype)


def compiled_chunks(backend: str) -> Callable[[tuple[Any, ...]], Tensor]:
    """torch.compile of UNROLL steps, called once a chunk: what a user writes who has no kernel."""
    torch._dynamo.config.recompile_limit = 64
    chunk = torch.compile(_steps, fullgraph=True, dynamic=False, backend=backend)

    def call(arguments: tuple[Any, ...]) -> Tensor:
        pieces = [t.movedim(-1, 0).contiguous().split(UNROLL) for t in _prepared(arguments)]
        A = arguments[2]
        h = A.new_zeros((arguments[0].shape[0], *A.shape))
        outputs: list[Tensor] = []
        for gain, drive, B, C in zip(*pieces, strict=True):
            h, y = chunk(h, gain, drive, A, B, C)
            outputs += y
        return _finished(torch.stack(outputs, 2), arguments)

    return call


def associative_scan(backend: str) -> Callable[[tuple[Any, ...]], Tensor]:
    """torch.compile of torch's own associative scan over all states of all steps."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    def call(arguments: tuple[Any, ...]) -> Tensor:
        dt, drive, B, C = _prepared(arguments)
        factors = torch.exp(dt[:, :, None] * arguments[2][:, :, None])
        _, h = scan(combine, (factors, drive[:, :, None] * B[:, None]), dim=3)
        return _finished((h * C[:, None]).sum(2), arguments)

    return torch.compile(call, dynamic=False, backend=backend)
