"""Adapter families: one a file."""

from moadapt.adapters.bank import Adapter, Bank
from moadapt.adapters.bias import Bias
from moadapt.adapters.bottleneck import Bottleneck
from moadapt.adapters.cross_modal import CrossModal
from moadapt.adapters.delta import Delta, Factors, NotMergeable
from moadapt.adapters.family import FamilySpec
from moadapt.adapters.hydra import Hydra
from moadapt.adapters.lora import LoRA
from moadapt.adapters.norm_tuning import NormTuning
from moadapt.adapters.peft_tuner import PeftTuner
from moadapt.adapters.prefix import Prefix
from moadapt.adapters.prompt_tokens import PromptTokens
from moadapt.adapters.pyramid import Pyramid
from moadapt.adapters.scale import Scale
from moadapt.adapters.soft_slots import SoftSlots

__all__ = [
    "Adapter",
    "Bank",
    "Bias",
    "Bottleneck",
    "CrossModal",
    "Delta",
    "Factors",
    "FamilySpec",
    "Hydra",
    "LoRA",
    "NormTuning",
    "NotMergeable",
    "PeftTuner",
    "Prefix",
    "PromptTokens",
    "Pyramid",
    "Scale",
    "SoftSlots",
]
