"""The wrapper that stands in a module's place while a mixture is attached."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moadapt.adapters.family import Bank
from moadapt.context import CallContext
from moadapt.sites import Site


class AdaptedModule(nn.Module):
    """A base module and the banks of its site.

    Args:
        module: The base's own module, never changed.
        banks: One a family, in the mixture's order.
        site: Where this is.
        context: The mixture's call context, which gives the routing.
    """

    def __init__(self, module: nn.Module, banks: Sequence[Bank], site: Site, context: CallContext) -> None:
        super().__init__()
        self.module = module
        self.banks = nn.ModuleList(banks)
        self._site, self._context = site, context

    def __getattr__(self, name: str) -> Any:
        """Answer for the base's module where its owner reads an attribute, such as `weight`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus what the banks add.

        Args:
            x: Input of the site, (B, T, D) or (N, D).
            args: Passed to the base's module.
            kwargs: Passed to the base's module.

        Raises:
            RuntimeError: The base was called without its mixture.
        """
        if not self._context.enabled:
            y: Tensor = self.module(x, *args, **kwargs)
            return y
        call = self._context.call
        if call is None:
            raise RuntimeError(
                f"{self._site.path} was run outside a call of its mixture; call the mixture instead of its base, use "
                "mixture.gradient_checkpointing_enable() for checkpointing, or detach() first"
            )
        routing = self._context.route(call, self._site, x)
        first, *others = (bank for bank in self.banks if isinstance(bank, Bank))
        y = first.adapt(self.module, x, routing, *args, **kwargs)
        for bank in others:
            y = bank.add_to(y, x, routing)
        return y
