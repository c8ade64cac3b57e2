"""Joining in at transformers' attention interface: what an attention module computes can be added to.

Attention modules look their kernel up by the name in their config. For one call, such a module gets a config that says
all that its own says, but names a function of ours; that function runs the kernel of the module's own config and adds
to what it gives. Nothing of the module is changed when the call is over, however it ends.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

Adding = Callable[[Tensor, float], Tensor]
"""Takes queries (B, H, T, d) and the factor of their products with keys; gives what is added, (B, T, H, d)."""
_NAME = "moadapt_adding"
_QUERIES = ("num_heads", "n_heads", "num_attention_heads")
_WIDTHS = ("head_dim", "key_value_proj_dim", "attention_head_size")


@dataclass(frozen=True)
class Heads:
    """Shapes of an attention module.

    Args:
        queries: How many heads it has, H.
        keys: How many heads of keys and values; each serves an equal share of the query heads.
        width: Numbers a head, d.
    """

    queries: int
    keys: int
    width: int


def attention_in(module: nn.Module) -> str | None:
    """Return the path, within a module, of the one attention that goes through the interface; None without exactly one.

    Args:
        module: A whole attention sublayer; `""` is the module itself.
    """
    found = [path for path, each in module.named_modules() if "ALL_ATTENTION_FUNCTIONS" in _code(each).co_names]
    return found[0] if len(found) == 1 and hasattr(module.get_submodule(found[0]), "config") else None


def heads_of(attention: nn.Module) -> Heads | None:
    """Read the shapes of an attention module, where it tells them by one of the names in use.

    Args:
        attention: As `attention_in` finds it.
    """
    known = {**vars(attention.config), **vars(attention)}
    queries = next((known[name] for name in _QUERIES if isinstance(known.get(name), int)), None)
    width = next((known[name] for name in _WIDTHS if isinstance(known.get(name), int)), None)
    if queries is None or width is None:
        return None
    return Heads(queries, queries // known.get("num_key_value_groups", 1), width)


@contextmanager
def adding(attention: nn.Module, add: Adding) -> Iterator[None]:
    """Let an attention module add to the output of its kernel within the `with` block.

    Args:
        attention: As `attention_in` finds it.
        add: Gives what is added.
    """
    own = attention.config
    attention.config = _Redirected(own, add)  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.config = own


class _Redirected:
    """A config that names another kernel and else answers as the one it stands for."""

    _attn_implementation = _NAME

    def __init__(self, config: Any, add: Adding) -> None:
        self.own, self.add = config, add

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Run the module's own kernel and add to its output."""
    redirected: Any = module.config
    module.config = redirected.own
    try:
        run = _kernel(module)
        given = kwargs if scaling is None else {**kwargs, "scaling": scaling}
        output, weights = run(module, query, key, value, attention_mask, *args, **given)
    finally:
        module.config = redirected
    return output + redirected.add(query, query.shape[-1] ** -0.5 if scaling is None else scaling), weights


AttentionInterface.register(_NAME, _attend)


def _kernel(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """Return what the module would run by itself: its file says which function `eager` stands for."""
    known = inspect.unwrap(type(module).forward).__globals__
    eager = next((name for name in _code(module).co_names if name.endswith("eager_attention_forward")), "")
    config: Any = module.config
    found: Callable[..., tuple[Tensor, Any]] = known["ALL_ATTENTION_FUNCTIONS"].get_interface(
        config._attn_implementation, known.get(eager)
    )
    return found


def _code(module: nn.Module) -> CodeType:
    code: CodeType = inspect.unwrap(type(module).forward).__code__
    return code
