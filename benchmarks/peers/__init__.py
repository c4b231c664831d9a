"""What users run today, a file for each: run beside us on the same inputs, in the same process and the same rounds."""

from __future__ import annotations

from peers import (
    accelerated_scan,
    fft_convolution,
    jax_chunked,
    jax_scans,
    mamba_ssm,
    mambapy,
    s4d_standalone,
    s5_pytorch,
    scipy_truncation,
    torch_forms,
    transformers_mamba,
)
from peers.base import Peer

MODULES = (
    jax_scans, jax_chunked, mamba_ssm, transformers_mamba, mambapy, accelerated_scan, s5_pytorch, s4d_standalone, torch_forms,
    fft_convolution, scipy_truncation,
)  # fmt: skip
PEERS: list[Peer] = [peer for module in MODULES for peer in module.PEERS]
