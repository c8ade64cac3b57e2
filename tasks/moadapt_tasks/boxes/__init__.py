"""Boxes as text, one convention a file; `moadapt list codecs` names them all."""

from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.integers import IntegerBoxes
from moadapt_tasks.boxes.views import Box, CannotWrite, Frame, View

__all__ = ["Box", "BoxCodec", "CannotWrite", "Frame", "IntegerBoxes", "View"]
