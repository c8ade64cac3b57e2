"""Gradient checkpointing of a base, whose own settings are kept so that they can be put back.

Blocks restore the call in which they ran before, so that routings are not decided again when a block is recomputed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_SETTINGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
_INPUT_HOOKS = ("_require_grads_hook", "_require_grads_hooks")
Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
Settings = dict[nn.Module, dict[str, Any]]


def enable_checkpointing(base: PreTrainedModel, contexts: Contexts) -> Settings:
    """Let blocks be recomputed in the backward pass, and return the settings that they had.

    Args:
        base: The base.
        contexts: Gives the contexts of a block's first run and of its second.

    Raises:
        ValueError: A block applies dropout of its own, which could not be kept off.
    """
    for path, block in base.named_modules():
        rate = getattr(block, "dropout", 0.0)
        if isinstance(block, GradientCheckpointingLayer) and isinstance(rate, float) and rate > 0:
            raise ValueError(f"{path} applies dropout {rate} itself; set its dropout to 0 to checkpoint it")
    own = {m: {n: vars(m)[n] for n in _SETTINGS if n in vars(m)} for m in base.modules()}
    # older transformers know it under the second name
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    hooks = {name: vars(base)[name] for name in _INPUT_HOOKS if name in vars(base)}
    enable({"use_reentrant": False, "context_fn": contexts})
    if hasattr(base, _INPUT_HOOKS[0]):  # transformers lets inputs require gradients, which reentrant ones alone need
        base.disable_input_require_grads()
    vars(base).update(hooks)
    return own


def swap_checkpointing(kept: Settings) -> None:
    """Exchange the settings that modules have with those that are kept.

    Args:
        kept: By module; holds the exchanged ones afterwards.
    """
    for module, other in kept.items():
        mine = {name: vars(module).pop(name) for name in _SETTINGS if name in vars(module)}
        vars(module).update(other)
        kept[module] = mine
