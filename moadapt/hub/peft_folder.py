"""A merge as a plain PEFT LoRA folder, which peft and servers of LoRAs load.

Scaling is 1 everywhere (alpha = rank, in patterns where ranks differ), targets are whole module paths, and the tensors
bear no adapter name, so no name can collide with a path.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moadapt.adapters.delta import Delta
from moadapt.fresh_folder import fresh_folder
from moadapt.hub.adapter_folder import CONFIG, TENSORS
from moadapt.hub.base_mark import mark

_PREFIX = "base_model.model."


def write_peft_folder(folder: Path, base: PreTrainedModel, deltas: Mapping[str, Sequence[Delta]]) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: Made, or replaced as a whole where it holds a PEFT LoRA.
        base: Without a mixture on it; the folder bears its name.
        deltas: What is added at every site, by module path.

    Raises:
        ValueError: A delta has a dense part, or a bias elsewhere than at a linear layer, which a LoRA cannot hold, a
            convolution is one that peft does not follow, all deltas are zero, or the folder holds something else.
    """
    factors = {name: pair for path, parts in deltas.items() for name, pair in _factors(path, parts).items()}
    biases = {path: bias for path, parts in deltas.items() if (bias := _bias(parts)) is not None}
    for path, bias in biases.items():
        factors.setdefault(path, (bias.new_zeros(1, _width(base, path)), bias.new_zeros(1, len(bias))))
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
        lora_bias=bool(biases),
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
            if biases:
                stored |= _stored_bias(name, base.get_submodule(name), biases.get(name), up)
        tensors |= {f"{_PREFIX}{key}": tensor.cpu().contiguous() for key, tensor in _narrowed(stored).items()}
    with fresh_folder(folder, (CONFIG, TENSORS)) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt", **mark(base)})
        config.save_pretrained(str(new))


def _factors(path: str, deltas: Sequence[Delta]) -> dict[str, tuple[Tensor, Tensor]]:
    """Stack a site's deltas and drop the ranks that add nothing.

    Returns:
        (R, D) and (R, F) under the module's path; (M, R, D) and (M, R, F) under those of parameters that stack
        matrices.
    """
    if any(delta.dense is not None for delta in deltas):
        raise ValueError(f"{path} has a dense part, which a LoRA folder cannot hold; merge to a model instead")
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


def _narrowed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in bfloat16 where that changes none of their numbers."""
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}
    exact = all(torch.equal(own.to(stored[name].dtype), stored[name]) for name, own in narrow.items())
    return narrow if exact else dict(stored)


def _bias(deltas: Sequence[Delta]) -> Tensor | None:
    """Return what a site's deltas add to its bias, (F,); None where that is nothing."""
    parts = [delta.bias for delta in deltas if delta.bias is not None]
    found = sum(parts[1:], parts[0]) if parts else None
    return found if found is not None and bool(found.any()) else None


def _width(base: PreTrainedModel, path: str) -> int:
    """Return the features that enter a linear layer, D."""
    module: Any = base.get_submodule(path)
    if not isinstance(module, nn.Linear | Conv1D):
        raise ValueError(
            f"{path} is a {type(module).__name__} with a change of its bias, which a LoRA folder cannot hold; merge to "
            "a model instead"
        )
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)


def _stored_bias(path: str, module: nn.Module, bias: Tensor | None, up: Tensor) -> dict[str, Tensor]:
    """Return the bias that peft wants at every target where one has one."""
    if isinstance(module, nn.Embedding):
        raise ValueError(
            f"{path} is an embedding, where peft has no LoRA as soon as others have a bias (lora_bias); merge to a "
            "model instead"
        )
    return {f"{path}.lora_B.bias": up.new_zeros(up.shape[1]) if bias is None else bias.to(up.dtype)}


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
