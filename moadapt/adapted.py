"""The wrapper that stands in a module's place while a mixture is attached."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from moadapt.adapters.family import Bank, check_routing, with_output
from moadapt.call import Call
from moadapt.context import CallContext
from moadapt.routing import Routing
from moadapt.sites import Site


class AdaptedModule(nn.Module):
    """A base module and the banks of its site.

    Args:
        module: The base's own module, never changed.
        banks: One a family; those that change how the module runs come first.
        site: Where this is.
        context: The mixture's call context, which gives the routing.
    """

    def __init__(self, module: nn.Module, banks: Sequence[Bank], site: Site, context: CallContext) -> None:
        super().__init__()
        self.module = module
        self.banks = nn.ModuleList(sorted(banks, key=lambda bank: not bank.runs_module))
        self._site, self._context = site, context

    def __getattr__(self, name: str) -> Any:
        """Answer for the base's module where its owner reads an attribute, such as `weight`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's output plus what the banks add.

        Args:
            args: What the base's module takes, the input of the site first.
            kwargs: What the base's module takes, by name.

        Raises:
            RuntimeError: The base was called without its mixture.
        """
        if not self._context.enabled:
            return self.module(*args, **kwargs)
        call = self._context.call
        if call is None:
            raise RuntimeError(
                f"{self._site.path} was run outside a call of its mixture; call the mixture instead of its base, use "
                "mixture.gradient_checkpointing_enable() for checkpointing, or detach() first"
            )
        x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        axes = x.shape[1:-1]
        if self._site.form != "linear" or len(axes) < 2:
            return self._adapted(x, self._context.route(call, self._site, x), call, *args, **kwargs)
        x = x.flatten(1, -2)  # a linear layer takes every vector by itself, and routings know one axis of tokens
        found = self._adapted(x, self._context.route(call, self._site, x), call, *args, **kwargs)
        return with_output(found, lambda y: y.unflatten(1, axes))

    def _adapted(self, x: Tensor, routing: Routing | None, call: Call, *args: Any, **kwargs: Any) -> Any:
        banks = [bank for bank in self.banks if isinstance(bank, Bank)]
        for bank in banks:
            check_routing(bank.family, self._site, routing)
        if self._site.form == "entry":
            entering = x
            for bank in banks:
                entering = entering + bank(x, x, routing, call)
            return self.module(entering, *args, **kwargs)
        first, *others = banks
        if others and any(bank.reads_output for bank in banks):
            running = first.adapt if first.runs_module else _run
            adding = others if first.runs_module else banks
            found = running(self.module, x, routing, call, *args, **kwargs)
            return with_output(found, lambda y: y + sum(bank(x, y, routing, call) for bank in adding))
        found = first.adapt(self.module, x, routing, call, *args, **kwargs)
        for bank in others:
            found = with_output(found, partial(bank.add_to, x=x, routing=routing, call=call))
        return found


def _run(module: nn.Module, x: Tensor, routing: Routing | None, call: Call, *args: Any, **kwargs: Any) -> Any:
    return module(x, *args, **kwargs)
