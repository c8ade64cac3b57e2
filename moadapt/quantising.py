"""How a base's linear layers are quantised while it is loaded."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig


def _int8(dtype: torch.dtype | None) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _int4(dtype: torch.dtype | None) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    four_bits: Any = getattr(torch, "int4")  # noqa: B009, torch does not declare it
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(32)))


def _nf4(dtype: torch.dtype | None) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _llm_int8(dtype: torch.dtype | None) -> Any:
    return BitsAndBytesConfig(load_in_8bit=True)


QUANTISATIONS: Mapping[str, tuple[str, Callable[[torch.dtype | None], Any]]] = {
    "int8": ("torchao", _int8),
    "int4": ("torchao", _int4),
    "nf4": ("bitsandbytes", _nf4),
    "llm_int8": ("bitsandbytes", _llm_int8),
}
"""By short name the library, and what makes transformers' config for it from the number type of the activations."""


def quantisation(name: str, dtype: torch.dtype | None) -> Any:
    """Return transformers' config for a short name.

    Args:
        name: `int8` (torchao, a scale for each output), `int4` (torchao, a scale for each 32 inputs, one number a
            byte), `nf4` (bitsandbytes, QLoRA's, with quantised scales) or `llm_int8` (bitsandbytes, inputs too).
        dtype: Number type of the activations; None is the library's choice.

    Raises:
        ValueError: The name is unknown, or its library is not installed.
    """
    if name not in QUANTISATIONS:
        raise ValueError(f"quantize is {name!r}; choose one of {', '.join(QUANTISATIONS)}")
    library, make = QUANTISATIONS[name]
    if find_spec(library) is None:
        raise ValueError(f"quantize: {name} needs {library}; run pip install 'moadapt[quant]'")
    return make(dtype)


def keep_packed(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking frozen weights for a processor's kernel, which rounds more and hides them.

    Args:
        model: Just loaded.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
