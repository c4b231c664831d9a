"""What the machine allows: its ceilings, measured, and the time below which a computation cannot come by them."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from compressm.benchmarking.results import Ceilings, Counts, Resource, Result

REPEATS = 7
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # larger than the caches
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
EXPONENTIALS = {"cpu": 1024, "cuda": 1 << 22}  # entries, on a CPU in the first cache
EXP_REPEATS = {"cpu": 4000, "cuda": 256}

# 2^x by rounding to an integer and a polynomial of degree 5, relative error 2e-7: what a kernel has to pay at the least.
EXP_SOURCE = """
#include <cstdint>
#include <cstring>
extern "C" void exponentials(const float* x, float* y, long n, long repeats) {
  for (long r = 0; r < repeats; ++r) {
    for (long i = 0; i < n; ++i) {
      float shifted = x[i] + 12582912.0f;
      int32_t integer, bits;
      std::memcpy(&integer, &shifted, 4);
      float f = x[i] - (shifted - 12582912.0f);
      float p = 0.0013276f;
      p = p * f + 0.0096754f;
      p = p * f + 0.0555071f;
      p = p * f + 0.2402219f;
      p = p * f + 0.6931472f;
      p = p * f + 1.0f;
      std::memcpy(&bits, &p, 4);
      bits += integer << 23;
      std::memcpy(&y[i], &bits, 4);
    }
    asm volatile("" ::: "memory");
  }
}
"""
EXP_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"  # known to x86 compilers


def measure_ceilings(device: torch.device | str) -> Ceilings:
    """Copy bandwidth, float32 matrix products and exponentials of a device on torch's threads, the best of a few runs each.

    Takes about a second.  Exponentials are computed in registers: on a CPU by a small C++ loop (torch's own where there is
    no compiler), on a GPU by a Triton kernel.
    """
    device = torch.device(device)
    kind = device.type
    size = MATMUL_SIZE[kind]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    matmul = _best(lambda: torch.mm(a, b, out=product), device)
    return Ceilings(
        copy_gb_per_s=2 * COPY_BYTES[kind] / copy / 1e9,
        matmul_gflop_per_s=2 * size**3 / matmul / 1e9,
        exp_g_per_s=(_gpu_exponentials(device) if kind == "cuda" else _cpu_exponentials()) / 1e9,
    )


def limit_of(counts: Counts, ceilings: Ceilings) -> tuple[float | None, Resource | None]:
    """(milliseconds, what binds): the longest of the three, as if they overlapped perfectly; (None, None) without counts.

    Bandwidth is that of memory: what stays in a cache between two calls may come out faster.
    """
    needed: dict[Resource, float] = {
        "bytes": counts.bytes / ceilings.copy_gb_per_s / 1e6,
        "flops": counts.flops / ceilings.matmul_gflop_per_s / 1e6,
        "exponentials": counts.exponentials / ceilings.exp_g_per_s / 1e6,
    }
    binding = max(needed, key=needed.__getitem__)
    return (needed[binding], binding) if needed[binding] > 0 else (None, None)


def higher(one: Ceilings, other: Ceilings) -> Ceilings:
    """The larger of each: a ceiling measured in a slow moment of the machine is none."""
    return Ceilings(**{name: max(value, getattr(other, name)) for name, value in one.model_dump().items()})


def limited_by(result: Result, ceilings: Ceilings) -> Result:
    """A result with its limit by other ceilings."""
    limit, resource = limit_of(result.counts, ceilings)
    return result.model_copy(update={"limit_ms": limit, "limit_by": resource})


def synchronizer(device: torch.device | str) -> Callable[[], None]:
    """Waits until a device has done its work; does nothing on a CPU."""
    device = torch.device(device)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls."""
    synchronize = synchronizer(device)
    seconds = []
    for _ in range(REPEATS + 1):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _cpu_exponentials() -> float:
    """Exponentials per second on all of torch's threads."""
    entries, repeats, threads = EXPONENTIALS["cpu"], EXP_REPEATS["cpu"], torch.get_num_threads()
    function = _compiled_exponentials()
    if function is None:
        x = torch.rand(1 << 18).neg()
        out = torch.empty_like(x)
        return x.numel() / _best(lambda: torch.exp2(x, out=out), torch.device("cpu"))
    buffers = [(torch.rand(entries).neg(), torch.empty(entries)) for _ in range(threads)]

    def one(buffer: tuple[torch.Tensor, torch.Tensor]) -> None:
        function(buffer[0].data_ptr(), buffer[1].data_ptr(), entries, repeats)

    with ThreadPoolExecutor(threads) as pool:
        return threads * entries * repeats / _best(lambda: list(pool.map(one, buffers)), torch.device("cpu"))


@functools.cache
def _compiled_exponentials() -> Callable[[int, int, int, int], None] | None:
    """The C++ loop, or None where it does not compile."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "exponentials.cpp", Path(folder) / "exponentials.so"
        source.write_text(EXP_SOURCE)
        for flags in ((*EXP_FLAGS, WIDE), EXP_FLAGS):
            command = [compiler, *flags, str(source), "-o", str(library)]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                function = ctypes.CDLL(str(library)).exponentials
                function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
                function.restype = None
                return function
    return None


def _gpu_exponentials(device: torch.device) -> float:
    from compressm.benchmarking._exponentials_triton import exponentials

    entries, repeats = EXPONENTIALS["cuda"], EXP_REPEATS["cuda"]
    x = torch.rand(entries, device=device).neg()
    out = torch.empty_like(x)
    return entries * repeats / _best(lambda: exponentials(x, out, repeats), device)
