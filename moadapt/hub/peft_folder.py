"""A merge as a plain PEFT LoRA folder, which peft and servers of LoRAs load.

Scaling is 1 everywhere (alpha = rank, in patterns where ranks differ), targets are whole module paths, and the tensors
bear no adapter name, so no name can collide with a path.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.adapters.family import Delta
from moadapt.storage import fresh_folder

_PREFIX = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_peft_folder(folder: Path, base: PreTrainedModel, deltas: Mapping[str, Sequence[Delta]]) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: Made, or replaced as a whole where it holds a PEFT LoRA.
        base: Without a mixture on it; the folder bears its name.
        deltas: What is added at every site, by module path.

    Raises:
        ValueError: A delta has a dense or bias part, which a LoRA cannot hold, a convolution is one that peft does not
            follow, all deltas are zero, or the folder holds something else.
    """
    factors = {path: _factors(path, parts) for path, parts in deltas.items()}
    factors = {path: pair for path, pair in factors.items() if len(pair[0])}
    if not factors:
        raise ValueError("every delta is zero, and a LoRA of rank 0 cannot be written; train the mixture first")
    ranks = {path: len(down) for path, (down, _) in factors.items()}
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {re.escape(path): rank for path, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(factors),
        fan_in_fan_out=any(isinstance(base.get_submodule(path), Conv1D) for path in factors),
        base_model_name_or_path=base.config.name_or_path,
        inference_mode=True,
        auto_mapping={"base_model_class": type(base).__name__, "parent_library": type(base).__module__},
    )
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in factors.items():
        stored = _stored(path, base.get_submodule(path), down, up)
        tensors |= {f"{_PREFIX}{path}.{name}": tensor.cpu().contiguous() for name, tensor in stored.items()}
    with fresh_folder(folder, (_CONFIG, _TENSORS)) as new:
        save_file(tensors, new / _TENSORS, metadata={"format": "pt"})
        config.save_pretrained(str(new))


def _factors(path: str, deltas: Sequence[Delta]) -> tuple[Tensor, Tensor]:
    """Stack a site's deltas and drop the ranks that add nothing; returns (R, D) and (R, F)."""
    if any(delta.dense is not None or delta.bias is not None for delta in deltas):
        raise ValueError(f"{path} has a dense or bias part, which a LoRA folder cannot hold; merge to a model instead")
    down, up = torch.cat([delta.down for delta in deltas]), torch.cat([delta.up for delta in deltas])
    live = up.abs().amax(dim=1) > 0
    return down[live], up[live]


def _stored(path: str, module: nn.Module, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return a site's factors (R, D) and (R, F) under the names and in the shapes that peft gives them."""
    if isinstance(module, nn.Embedding):
        return {"lora_embedding_A": down, "lora_embedding_B": up.T}
    if not isinstance(module, nn.Conv2d):
        return {"lora_A.weight": down, "lora_B.weight": up.T}
    if set(module.dilation) != {1} or module.padding_mode != "zeros":
        raise ValueError(
            f"{path} convolves with dilation {module.dilation} and padding {module.padding_mode!r}, which peft's LoRA "
            "does not follow; merge to a model instead"
        )
    kernels = down.view(-1, module.in_channels, *module.kernel_size)
    return {"lora_A.weight": kernels, "lora_B.weight": up.T[..., None, None]}
