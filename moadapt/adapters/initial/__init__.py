"""Initial states of low-rank adapters: one a file."""

from moadapt.adapters.initial.interface import Initial, Layer

__all__ = ["Initial", "Layer"]
