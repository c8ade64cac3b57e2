"""Adapters of the peft library and its like, in and out."""

from moadapt.hub.diagnosis import FATES, Diagnosis, KeyFate
from moadapt.hub.reading import ReadAdapter, examine, read_adapter

__all__ = ["FATES", "Diagnosis", "KeyFate", "ReadAdapter", "examine", "read_adapter"]
