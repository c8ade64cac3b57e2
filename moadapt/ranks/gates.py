"""Placement by gates: every LoRA has a gate at every site, trained along under a price, then shut or opened for good.

A gate is the logistic of a logit `a`, in [0, 1], on what an adapter adds at a site. The joint loss is the answers'
plus `price sum(gate params) / sum(params)`, the share of the parameters that is expected to stay. As in Louizos et al.,
"Learning Sparse Neural Networks through L0 Regularization", section 2.2, a step does not use the gate itself but a
draw around it, `z = logistic((a + n) / T)` with logistic noise `n`, which is above 1/2 with the probability `gate`.
Without noise a growing `up` could make up for a gate that falls, so that a small gate would cost nothing.

Of a term `z s up down^T` the gradient of `up` tells that of the gate: `dL/dz = <up, dL/d up> / z`. So gates need no
graph of their own: a bank multiplies its scales by constants, and `da` follows from gradients that the processes agreed
on. Draws follow the step alone, so that processes agree and a resumed run goes on. Gates take steps of their own, by
Adam.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moadapt.adapters.bank import Bank
from moadapt.adapters.lora_bank import LoRABank
from moadapt.ranks.allocator import RankAllocator, RankDriver, cost_of, highest, lora_banks
from moadapt.registry import RANKS
from moadapt.sites import Site

_TEMPERATURE = 2 / 3  # as published


@RANKS.register("gates")
@dataclass(frozen=True, kw_only=True)
class Gates(RankAllocator):
    """Chooses the sites of all LoRAs by gates that train along, under a price per parameter and one budget.

    Args:
        budget: Parameters that are kept at most: up to 1 a share of what the fit starts with, above that a number.
        price: What all parameters together may cost, in the unit of the loss; a site whose share of it is worth more
            than what the adapter does there is shut. At 0 the budget alone decides.
        until: Share of the steps after which gates are opened or shut for good; the rest trains what is left.
        learning_rate: Of the logits of gates.
        start: What gates begin with, above 1/2 and below 1.

    Raises:
        ValueError: A number is out of range.
    """

    budget: float = 0.5
    price: float = 0.1
    until: float = 0.5
    learning_rate: float = 0.05
    start: float = 0.9

    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.budget, self.learning_rate) <= 0 or self.price < 0:
            raise ValueError(f"{self} is out of range; budget and learning_rate are above 0, price at least 0")
        if not 0.5 < self.start < 1 or not 0 < self.until <= 1:
            raise ValueError(f"{self}: start is above 1/2 and below 1, until above 0 and at most 1")

    def driver(self, banks: Iterable[tuple[Site, Bank]], steps: float) -> "GateDriver":
        """Return what trains the gates.

        Raises:
            ValueError: There are no LoRAs that train, the steps have no end, or the budget pays for no site.
        """
        if steps == float("inf"):
            raise ValueError("gates close after a share of the steps; give the trainer max_steps or max_epochs")
        return GateDriver(banks, self, int(steps))


@dataclass(frozen=True, eq=False)
class Gated:
    """One adapter at one site.

    Args:
        site: Where.
        bank: The bank there.
        adapter: Its name.
        down: The stack that its `down` is part of.
        up: The stack that its `up` is part of.
        rows: Which rows of both.
    """

    site: Site
    bank: LoRABank
    adapter: str
    down: torch.nn.Parameter
    up: torch.nn.Parameter
    rows: slice

    @property
    def cost(self) -> int:
        """How many parameters it has."""
        return int(self.rows.stop - self.rows.start) * cost_of(self.site)

    @torch.no_grad()
    def pull(self) -> Tensor:
        """Return `<up, dL/d up>`, the gate's own gradient times the gate."""
        if self.up.grad is None:
            return self.up.new_zeros((), dtype=torch.float64)
        return (self.up[self.rows].double() * self.up.grad[self.rows].double()).sum()


class GateDriver(RankDriver):
    """Trains the gates of all LoRAs that train, and hardens them.

    Args:
        banks: Those of the mixture; other families, and LoRAs whose start is taken off, are left alone.
        settings: What the user chose.
        steps: Steps of the optimiser in all.

    Raises:
        ValueError: There are no LoRAs that train, or the budget pays for none of their sites.
    """

    def __init__(self, banks: Iterable[tuple[Site, Bank]], settings: Gates, steps: int) -> None:
        self.settings, self.step, self.last = settings, 0, max(1, round(settings.until * steps))
        self.gated = [each for site, bank in lora_banks(banks) for each in gated_at(site, bank)]
        if not self.gated:
            raise ValueError("gates need LoRAs that train and start at zero; this mixture has none")
        self._of_bank: dict[LoRABank, list[int]] = {}
        for index, each in enumerate(self.gated):
            self._of_bank.setdefault(each.bank, []).append(index)
        self.costs = torch.tensor([each.cost for each in self.gated])
        self.budget = budget_of(settings.budget, self.costs)
        start = torch.tensor(settings.start, dtype=torch.float64).logit()
        self.logits = torch.nn.Parameter(start.repeat(len(self.gated)))
        self._adam = torch.optim.Adam([self.logits], lr=settings.learning_rate)
        self.kept = torch.ones(len(self.gated), dtype=torch.bool)
        self._set(self._drawn())

    def observe(self) -> None:
        """Find the gradient of the logits."""
        pulls = torch.stack([each.pull() for each in self.gated]).cpu()
        gates, shares = self.gates, self.costs / self.costs.sum()
        priced = self.settings.price * shares * gates * (1 - gates)
        self.logits.grad = pulls * (1 - self._drawn()) / _TEMPERATURE + priced

    def act(self) -> None:
        """Move the gates and draw anew; harden them where it is time, and keep shut what is shut."""
        self.step += 1
        if self.step <= self.last:
            self._adam.step()
            self.logits.grad = None  # so that a step whose gradients nobody showed moves no gate
            if self.step == self.last:
                self._harden()
        self._set(self._drawn())
        if self.step >= self.last:
            self._prune()

    @property
    def gates(self) -> Tensor:
        """The gates before any draw, (N,)."""
        return self.logits.detach().sigmoid()

    def readings(self) -> dict[str, float]:
        """Return how many parameters are expected to stay, or do."""
        stay = self.kept.double() if self.step >= self.last else self.gates
        return {"gates/parameters": float(stay @ self.costs.double())}

    def state(self) -> dict[str, Any]:
        """Return step, logits with their moments, and choice."""
        logits = self.logits.detach().clone()
        return {"step": self.step, "logits": logits, "adam": self._adam.state_dict(), "kept": self.kept.clone()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take step, logits with their moments, and choice."""
        if state["logits"].shape != self.logits.shape:
            raise ValueError(
                "the gates in this checkpoint belong to other adapters; resume with the same model settings"
            )
        self.logits.data.copy_(state["logits"])
        self._adam.load_state_dict(state["adam"])
        self.step, self.kept = int(state["step"]), state["kept"].cpu().clone()
        self._set(self._drawn())

    def _drawn(self) -> Tensor:
        """Return what stands for the gates in this step, (N,)."""
        if self.step >= self.last:
            return self.kept.double()
        generator = torch.Generator().manual_seed(self.step)
        uniform = torch.rand(len(self.gated), generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        return ((self.logits.detach() + uniform.logit()) / _TEMPERATURE).sigmoid()

    def _harden(self) -> None:
        """Keep the open gates, the widest first, as far as the budget goes; the price counted costs already."""
        open_ = self.gates >= 0.5 if self.settings.price else torch.ones_like(self.kept)
        self.kept = torch.zeros_like(self.kept)
        logits, costs = self.logits.detach()[open_], self.costs[open_]
        self.kept[open_] = highest(logits * costs, costs, self.budget)

    def _set(self, factors: Tensor) -> None:
        found = factors.tolist()
        for bank, own in self._of_bank.items():
            bank.gate({self.gated[index].adapter: found[index] for index in own})

    @torch.no_grad()
    def _prune(self) -> None:
        for each, kept in zip(self.gated, self.kept.tolist(), strict=True):
            if not kept:
                each.up[each.rows] = 0.0


def budget_of(given: float, costs: Tensor) -> int:
    """Return a budget in parameters.

    Args:
        given: Up to 1 a share of all costs, above that a number.
        costs: Of all candidates, (N,).

    Raises:
        ValueError: It pays for none of them.
    """
    budget = int(given * int(costs.sum())) if given <= 1 else int(given)
    if budget < int(costs.min()):
        raise ValueError(
            f"a budget of {given:g} is {budget:,} parameters, but the cheapest site takes {int(costs.min()):,} of "
            f"{int(costs.sum()):,} in all; give more, or adapters of a lower rank"
        )
    return budget


def gated_at(site: Site, bank: LoRABank) -> Iterator[Gated]:
    """Iterate over the adapters of a bank that train, in the order of their rows.

    Args:
        site: Where.
        bank: One of those that `lora_banks` gives.
    """
    names = [name for name in bank.names if name not in bank.frozen]
    for part in ("shared", "expert"):
        down, up, start = getattr(bank, f"{part}_down"), getattr(bank, f"{part}_up"), 0
        while up is not None and start < len(up):
            name = names.pop(0)
            rows = slice(start, start + len(bank.live(name, "up")))
            yield Gated(site, bank, name, down, up, rows)
            start = rows.stop
