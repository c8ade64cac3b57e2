"""Adapter families: one a file."""

from moadapt.adapters.bottleneck import Bottleneck
from moadapt.adapters.cross_modal import CrossModal
from moadapt.adapters.family import Adapter, Bank, Delta, Factors, FamilySpec, NotMergeable
from moadapt.adapters.lora import LoRA

__all__ = ["Adapter", "Bank", "Bottleneck", "CrossModal", "Delta", "Factors", "FamilySpec", "LoRA", "NotMergeable"]
