"""Initial states of low-rank adapters: one a file."""

from moadapt.adapters.initial.interface import Initial, Layer, filled_later, is_filled_later

__all__ = ["Initial", "Layer", "filled_later", "is_filled_later"]
