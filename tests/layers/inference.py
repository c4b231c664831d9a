"""What generation loops pass to layers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class InferenceParams:
    """As of mamba_ssm."""

    seqlen_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
