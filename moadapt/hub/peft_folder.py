"""A merge as a plain PEFT LoRA folder, which peft and servers of LoRAs load.

Scaling is 1 everywhere (alpha = rank, in patterns where ranks differ), targets are whole module paths, and the tensors
bear no adapter name, so no name can collide with a path.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.adapters.delta import Delta
from moadapt.fresh_folder import fresh_folder

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
    factors = {name: pair for path, parts in deltas.items() for name, pair in _factors(path, parts).items()}
    if not factors:
        raise ValueError("every delta is zero, and a LoRA of rank 0 cannot be written; train the mixture first")
    ranks = {name: down.shape[-2] for name, (down, _) in factors.items()}
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != most}
    modules = sorted(name for name, (down, _) in factors.items() if down.ndim == 2)
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=modules,
        target_parameters=sorted(factors.keys() - set(modules)) or None,
        fan_in_fan_out=any(isinstance(base.get_submodule(path), Conv1D) for path in modules),
        base_model_name_or_path=base.config.name_or_path,
        inference_mode=True,
        auto_mapping={"base_model_class": type(base).__name__, "parent_library": type(base).__module__},
    )
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        if down.ndim == 3:
            stored = _stored_experts(base, name, factors)
        else:
            stored = _stored(name, base.get_submodule(name), down, up)
        tensors |= {f"{_PREFIX}{key}": tensor.cpu().contiguous() for key, tensor in stored.items()}
    with fresh_folder(folder, (_CONFIG, _TENSORS)) as new:
        save_file(tensors, new / _TENSORS, metadata={"format": "pt"})
        config.save_pretrained(str(new))


def _factors(path: str, deltas: Sequence[Delta]) -> dict[str, tuple[Tensor, Tensor]]:
    """Stack a site's deltas and drop the ranks that add nothing.

    Returns:
        (R, D) and (R, F) under the module's path; (M, R, D) and (M, R, F) under those of parameters that stack
        matrices.
    """
    if any(delta.dense is not None or delta.bias is not None for delta in deltas):
        raise ValueError(f"{path} has a dense or bias part, which a LoRA folder cannot hold; merge to a model instead")
    named: dict[str, list[Delta]] = {path: list(deltas)}
    for delta in deltas:
        for name, part in delta.parameters.items():
            named.setdefault(f"{path}.{name}", []).append(part)
    found = {}
    for name, parts in named.items():
        down, up = (torch.cat(sides, dim=-2) for sides in ([p.down for p in parts], [p.up for p in parts]))
        if not up.numel():
            continue
        live = (up != 0).any(dim=-1).reshape(-1, up.shape[-2]).any(dim=0)
        if bool(live.any()):
            found[name] = (down[..., live, :], up[..., live, :])
    return found


def _stored_experts(
    base: PreTrainedModel, name: str, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the factors of a parameter that stacks matrices as peft wraps such parameters, the last one outermost."""
    path, _, own = name.rpartition(".")
    wrapped = [p for p, _ in base.get_submodule(path).named_parameters(recurse=False) if f"{path}.{p}" in factors]
    around = "base_layer." * (len(wrapped) - 1 - wrapped.index(own))
    down, up = factors[name]
    stored = {"A": rearrange(down, "m r d -> (m r) d"), "B": rearrange(up, "m r f -> f (r m)")}
    return {f"{path}.{around}lora_{side}.weight": tensor for side, tensor in stored.items()}


def _stored(path: str, module: nn.Module, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return a site's factors (R, D) and (R, F) under the names and in the shapes that peft gives them."""
    if isinstance(module, nn.Embedding):
        return {f"{path}.lora_embedding_A": down, f"{path}.lora_embedding_B": up.T}
    if not isinstance(module, nn.Conv2d):
        return {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up.T}
    if set(module.dilation) != {1} or module.padding_mode != "zeros":
        raise ValueError(
            f"{path} convolves with dilation {module.dilation} and padding {module.padding_mode!r}, which peft's LoRA "
            "does not follow; merge to a model instead"
        )
    kernels = down.view(-1, module.in_channels, *module.kernel_size)
    return {f"{path}.lora_A.weight": kernels, f"{path}.lora_B.weight": up.T[..., None, None]}
