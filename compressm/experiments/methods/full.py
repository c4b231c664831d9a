"""The model at full size from start to end."""

from __future__ import annotations

from compressm.experiments.methods.base import Look, Method


class Full(Method):
    """Nothing is cut."""

    name = "full"
    title = "full size"
    phrase = "the full-size run"
    look = Look("#6b7480", "#a5afba", layer=2.0)
    reference = True
