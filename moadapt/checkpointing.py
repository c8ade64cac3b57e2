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

    A block is recomputed only in training mode, in which it would apply dropout of its own; its rates are set to 0.

    Args:
        base: The base.
        contexts: Gives the contexts of a block's first run and of its second.
    """
    own = {module: _settings(module) for module in base.modules()}
    # older transformers know it under the second name
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    hooks = {name: vars(base)[name] for name in _INPUT_HOOKS if name in vars(base)}
    enable({"use_reentrant": False, "context_fn": contexts})
    if hasattr(base, _INPUT_HOOKS[0]):  # transformers lets inputs require gradients, which reentrant ones alone need
        base.disable_input_require_grads()
    vars(base).update(hooks)
    for module in base.modules():
        vars(module).update(dict.fromkeys(_rates(module), 0.0))
    return own


def swap_checkpointing(kept: Settings) -> None:
    """Exchange the settings that modules have with those that are kept.

    Args:
        kept: By module; holds the exchanged ones afterwards.
    """
    for module, other in kept.items():
        mine = _settings(module)
        for name in mine:
            del vars(module)[name]
        vars(module).update(other)
        kept[module] = mine


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in (*_SETTINGS, *_rates(module)) if name in vars(module)}


def _rates(module: nn.Module) -> list[str]:
    """Names under which a block keeps rates of dropout that it applies itself."""
    if not isinstance(module, GradientCheckpointingLayer):
        return []
    return [name for name, value in vars(module).items() if name.endswith("dropout") and isinstance(value, float)]
