"""Who is told how a run goes on, and does not mind."""

from __future__ import annotations


class Silent:
    """Listens and says nothing."""

    def point(self, run, point): ...

    def evaluation(self, run, evaluation): ...

    def reduction(self, run, reduction): ...
