"""The wrapper that stands in a module's place while a mixture is attached."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moadapt.acting import acting
from moadapt.adapters.bank import Bank, with_output
from moadapt.adapters.family import check_routing
from moadapt.adapters.weighing import over_features
from moadapt.call import Call
from moadapt.context import CallContext
from moadapt.routing import Routing
from moadapt.sites import Site


class AdaptedModule(nn.Module):
    """A base module and the banks of its site.

    Args:
        module: The base's own module, never changed.
        banks: One a family; the one that changes how the module runs comes first.
        site: Where this is.
        context: The mixture's call context, which gives the routing.
        pools: Whether an input of two axes and as many vectors as rows is one vector a row, as at a classifier.

    Raises:
        ValueError: Several banks change how the module runs, or one does where the router waits for what comes out, or
            one that acts on some tokens cannot leave out others.
    """

    def __init__(
        self, module: nn.Module, banks: Sequence[Bank], site: Site, context: CallContext, pools: bool = False
    ) -> None:
        super().__init__()
        running = [f"{bank.family.__name__} of {', '.join(bank.names)}" for bank in banks if bank.runs_module]
        if len(running) > 1:
            raise ValueError(
                f"{site.path} would carry {len(running)} stacks of adapters that change how the module itself runs "
                f"({'; '.join(running)}), and it can run in one way only; give the adapters there one family and the "
                "options that a stack shares, such as lr_ratio, or place them apart"
            )
        for bank in banks:
            if bank.acts_on and (bank.runs_module or not bank.family.standalone):
                raise ValueError(
                    f"{site.path}: {bank.family.__name__} of {', '.join(bank.names)} acts on "
                    f"{' and '.join(bank.acts_on)}, but what it does there cannot be taken off single tokens; leave "
                    "acts_on out, or choose another family or another site"
                )
        judge = context.judge(site)
        if judge is not None and running:
            raise ValueError(
                f"{site.path}: the {type(judge).__name__} there decides on what the module and each expert give, but "
                f"{running[0]} changes how the module itself runs, so that nothing is known before; choose another "
                "router, or another family there"
            )
        self._input = next(iter(inspect.signature(module.forward).parameters))
        self.module = module
        self.banks = nn.ModuleList(sorted(banks, key=lambda bank: not bank.runs_module))
        self._site, self._context, self._pools = site, context, pools

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
            TypeError: The input is missing.
        """
        if not self._context.enabled:
            return self.module(*args, **kwargs)
        call = self._context.call
        if call is None:
            raise RuntimeError(
                f"{self._site.path} was run outside a call of its mixture; call the mixture instead of its base, use "
                "mixture.gradient_checkpointing_enable() for checkpointing, or detach() first"
            )
        if not args and self._input not in kwargs:
            raise TypeError(f"{self._site.path} was called without its input, {self._input}")
        x, args = (args[0], args[1:]) if args else (kwargs.pop(self._input), ())
        axes = x.shape[1:-1]
        if self._site.form == "linear" and len(axes) > 1:  # it takes every vector by itself, and routings know one axis
            found = self._adapted(x.flatten(1, -2), call, *args, **kwargs)
            return with_output(found, lambda y: y.unflatten(1, axes))
        if self._flattened(x, call):
            assert call.real is not None, "its tokens were counted"
            found = self._adapted(x.unflatten(0, call.real.shape), call, *args, **kwargs)
            return with_output(found, lambda y: y.flatten(0, 1))
        if self._pools and x.ndim == 2 and len(x) == call.num_rows:
            found = self._adapted(x.unsqueeze(1), call, *args, **kwargs)
            return with_output(found, lambda y: y.squeeze(1))
        return self._adapted(x, call, *args, **kwargs)

    def _flattened(self, x: Tensor, call: Call) -> bool:
        """Whether a module gets the tokens of all rows in one axis, as in OPT."""
        alone = self._site.form in ("linear", "norm") and self._site.tower == "language" and x.ndim == 2
        return alone and call.real is not None and len(x) == call.real.numel()

    def _adapted(self, x: Tensor, call: Call, *args: Any, **kwargs: Any) -> Any:
        judge = None if call.overridden else self._context.judge(self._site)
        if judge is not None:
            found = self.module(x, *args, **kwargs)
            return with_output(found, lambda y: y + self._judged(x, y, judge.num_experts, call))
        routing = self._context.route(call, self._site, x)
        self._context.tell(self._site, x, routing)
        banks = self._heeding(routing, x, call)
        if self._site.form == "entry":
            entering = x
            for bank, own in banks:
                entering = self._add(bank, entering, x, own, call)
            return self.module(entering, *args, **kwargs)
        (first, own), *others = banks
        if others and any(bank.reads_output for bank, _ in banks):
            running = first.adapt if first.runs_module else _run
            adding = others if first.runs_module else banks
            found = running(self.module, x, own, call, *args, **kwargs)
            return with_output(found, lambda y: y + sum(self._delta(bank, y, x, own, call) for bank, own in adding))
        running, adding = (_run, banks) if first.acts_on else (first.adapt, others)
        found = running(self.module, x, own, call, *args, **kwargs)
        for bank, own in adding:
            found = with_output(found, partial(self._add, bank, x=x, routing=own, call=call))
        return found

    def _judged(self, x: Tensor, y: Tensor, num_experts: int, call: Call) -> Tensor:
        """Return the delta of all banks, by a router that decides on what each expert gives."""
        each = []
        for bank in self.banks:
            assert isinstance(bank, Bank), "wrappers hold banks"
            if bank.has_experts:
                outputs = bank.expert_outputs(x, y, num_experts, call)
                others = self._others(bank, x, call)
                each.append(outputs if others is None else outputs.masked_fill(others.unsqueeze(-1), 0.0))
        routing = self._context.route(call, self._site, x, y, torch.stack(each).sum(dim=0)) if each else None
        self._context.tell(self._site, x, routing)
        banks = self._heeding(routing, x, call)
        return torch.stack([self._delta(bank, y, x, own, call) for bank, own in banks]).sum(dim=0)

    def _heeding(self, routing: Routing | None, x: Tensor, call: Call) -> list[tuple[Bank, Routing | None]]:
        """Return the banks, each with what it heeds of a routing: a shared adapter counts once whatever it says.

        Where the shared adapter stands once a task, its bank's twin comes instead.
        """
        found: list[tuple[Bank, Routing | None]] = []
        for bank in self.banks:
            assert isinstance(bank, Bank), "wrappers hold banks"
            own = routing if bank.has_experts else None
            check_routing(bank.family, self._site, own)
            twin = None if call.copies is None else call.copies.of(bank, own, self._site, x, call)
            found.append((bank, own) if twin is None else twin)
        return found

    def _add(self, bank: Bank, y: Tensor, x: Tensor, routing: Routing | None, call: Call) -> Tensor:
        if not bank.acts_on:
            return bank.add_to(y, x, routing, call)
        return y + self._delta(bank, y, x, routing, call)

    def _delta(self, bank: Bank, y: Tensor, x: Tensor, routing: Routing | None, call: Call) -> Tensor:
        """Return what a bank adds, zero at the tokens that it does not act on."""
        delta: Tensor = bank(x, y, routing, call)
        others = self._others(bank, x, call)
        if others is None:
            return delta
        return delta.masked_fill(over_features(others.expand(-1, -1, y.shape[-1]), x, y), 0.0)

    def _others(self, bank: Bank, x: Tensor, call: Call) -> Tensor | None:
        """Return the tokens that a bank does not act on, (B, T, 1); None where it acts on all."""
        return ~acting(call, self._site, bank.acts_on, x).unsqueeze(-1) if bank.acts_on else None


def _run(module: nn.Module, x: Tensor, routing: Routing | None, call: Call, *args: Any, **kwargs: Any) -> Any:
    return module(x, *args, **kwargs)
