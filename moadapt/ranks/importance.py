"""Ranks by importance under one budget over layers, towers, experts and the shared adapter.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", section 3, on plain LoRA banks.
A LoRA is a sum of rank-one terms `s up_i down_i^T`; in AdaLoRA a term has a factor `lambda_i` of its own, and to prune
it is to set that to zero. Here `lambda_i` is folded into `up_i`: to prune is to set `up_i` to zero. The forward pass is
then exactly that without the term, and `up_i`, whose gradient does not vanish with it, can grow again before the end.
The gradient of a `lambda_i` of 1 is `<up_i, dL/d up_i>`, so the score of AdaLoRA's triplet is kept whole.

The sensitivity of a weight is `I = |w dL/dw|`, smoothed to `Ibar`, and its spread `|I - Ibar|` to `Ubar`; the score of
a weight is `Ibar Ubar`, that of a term its `lambda_i`'s plus the means over `up_i` and over `down_i`. The budget falls
along a cubic, `b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3`, and the last `t_f` steps train what is left.
What differs: no penalty pulls the terms of an adapter apart (planted ranks are found without, and found less often
with), and an expert that no row of a step used keeps its scores, as the optimiser keeps its moments.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moadapt.adapters.bank import Bank
from moadapt.adapters.lora_bank import LoRABank
from moadapt.ranks.allocator import RankAllocator, RankDriver, cost_of, highest, lora_banks
from moadapt.registry import RANKS
from moadapt.sites import Site


def budget_at(step: int, first: int, last: int, start: int, end: int, total: int) -> int:
    """Return the budget in a step.

    Args:
        step: From 0, how many were taken.
        first: Budget at the start, b_0.
        last: Budget at the end, b_T.
        start: Steps before it falls, t_i.
        end: Steps after it fell, t_f.
        total: Steps in all, T.
    """
    if step < start:
        return first
    left = max(0.0, 1 - (step - start) / max(1, total - end - start))
    return last + round((first - last) * left**3)


@RANKS.register("importance")
@dataclass(frozen=True, kw_only=True)
class Importance(RankAllocator):
    """Prunes the least important ranks of all LoRAs while they train, under one global budget.

    Start with about 1.5 times the rank that is wanted in the end.

    Args:
        budget: What is kept in the end: up to 1 a share of what the fit starts with, above that a whole number of
            units.
        unit: What a budget counts: `ranks`, or their `parameters`, of which wide sites have more.
        start: Share of the steps before the budget falls.
        settle: Share of the steps, at the end, that train what is left.
        every: Steps between two choices of what is kept.
        smoothing: Of sensitivities and of their spread, from 0 up to below 1.

    Raises:
        ValueError: A number is out of range.
    """

    budget: float = 2 / 3
    unit: Literal["ranks", "parameters"] = "ranks"
    start: float = 0.1
    settle: float = 0.2
    every: int = 10
    smoothing: tuple[float, float] = (0.85, 0.85)

    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.budget <= 0 or self.every < 1 or self.unit not in ("ranks", "parameters"):
            raise ValueError(f"{self} is out of range; budget is above 0, every at least 1, unit ranks or parameters")
        if self.budget > 1 and self.budget != int(self.budget):
            raise ValueError(
                f"importance got budget={self.budget:g}; up to 1 it is a share of the start, above that a whole number "
                f"of {self.unit}"
            )
        if min(self.start, self.settle) < 0 or self.start + self.settle >= 1:
            raise ValueError(f"{self}: start and settle are shares of the steps, at least 0, and below 1 together")
        if not all(0 <= each < 1 for each in self.smoothing):
            raise ValueError(f"{self}: smoothing is two numbers from 0 to below 1")

    def driver(self, banks: Iterable[tuple[Site, Bank]], steps: float) -> "ImportanceDriver":
        """Return what prunes the banks' terms over so many steps.

        Raises:
            ValueError: There are no LoRAs that train, or the steps have no end.
        """
        if steps == float("inf"):
            raise ValueError("importance spends its budget until the end; give the trainer max_steps or max_epochs")
        return ImportanceDriver(banks, self, int(steps))


class Terms(nn.Module):
    """The terms of one parameter pair of a bank, shared or experts', with their smoothed sensitivities.

    Args:
        down: (R, D).
        up: (R, F).
        owner: Whose each term is, from 0, (R,).
        cost: What a term counts in the budget.
    """

    mean: Tensor

    def __init__(self, down: nn.Parameter, up: nn.Parameter, owner: Tensor, cost: int) -> None:
        super().__init__()
        self._pair, self.owner, self.cost = (down, up), owner.to(down.device), cost
        for name, like in (("down", down), ("up", up), ("factor", down[:, :1])):
            self.register_buffer(f"mean_{name}", torch.zeros_like(like, dtype=torch.float32))
            self.register_buffer(f"spread_{name}", torch.zeros_like(like, dtype=torch.float32))

    @torch.no_grad()
    def observe(self, smoothing: tuple[float, float]) -> None:
        """Take the gradients of a step in."""
        down, up = self._pair
        grad_down, grad_up = down.grad, up.grad
        if grad_down is None or grad_up is None:
            return
        touched = (grad_down != 0).any(dim=1) | (grad_up != 0).any(dim=1)
        used = torch.zeros(int(self.owner.max()) + 1, dtype=torch.bool, device=up.device)
        used[self.owner[touched]] = True
        sensitivities = {
            "down": down.float() * grad_down.float(),
            "up": up.float() * grad_up.float(),
            "factor": (up.float() * grad_up.float()).sum(dim=1, keepdim=True),
        }
        rows = used[self.owner].unsqueeze(1)
        for name, found in sensitivities.items():
            mean, spread = self.get_buffer(f"mean_{name}"), self.get_buffer(f"spread_{name}")
            size = found.abs()
            new = torch.lerp(size, mean, smoothing[0])
            mean.copy_(torch.where(rows, new, mean))
            spread.copy_(torch.where(rows, torch.lerp((size - new).abs(), spread, smoothing[1]), spread))

    def scores(self) -> Tensor:
        """Return the score of every term, (R,), in float64 on the CPU."""
        parts = [self.get_buffer(f"mean_{n}") * self.get_buffer(f"spread_{n}") for n in ("down", "up", "factor")]
        return sum((part.double().mean(dim=1) for part in parts), torch.zeros(())).cpu()

    @torch.no_grad()
    def prune(self, kept: Tensor) -> None:
        """Set `up` to zero in the terms that are not kept.

        Args:
            kept: (R,), bool.
        """
        self._pair[1].masked_fill_(~kept.to(self._pair[1].device).unsqueeze(1), 0.0)


class ImportanceDriver(RankDriver):
    """Scores the terms of all LoRAs that train, and prunes the lowest.

    Args:
        banks: Those of the mixture; other families, and LoRAs whose start is taken off, are left alone.
        settings: What the user chose.
        steps: Steps of the optimiser in all.

    Raises:
        ValueError: There are no LoRAs that train, or the budget is above what there is or pays for no term.
    """

    def __init__(self, banks: Iterable[tuple[Site, Bank]], settings: Importance, steps: int) -> None:
        self.settings, self.steps, self.step = settings, steps, 0
        self.terms = {name: terms for site, bank in lora_banks(banks) for name, terms in self._terms(site, bank)}
        if not self.terms:
            raise ValueError("ranks by importance need LoRAs that train and start at zero; this mixture has none")
        self._costs = torch.cat([torch.full((len(t.owner),), t.cost) for t in self.terms.values()])
        self.first = int(self._costs.sum())
        budget = settings.budget
        self.last = round(self.first * budget) if budget <= 1 else int(budget)
        if self.last > self.first:
            raise ValueError(f"importance got budget={budget:g}, but the fit starts with {self.first} {settings.unit}")
        if self.last < int(self._costs.min()):
            raise ValueError(
                f"importance got budget={budget:g}, which is {self.last} of the {self.first} {settings.unit} that the "
                f"fit starts with, and a term takes {int(self._costs.min())}; give more"
            )
        self.kept = torch.ones(len(self._costs), dtype=torch.bool)

    def observe(self) -> None:
        """Score the terms."""
        for terms in self.terms.values():
            terms.observe(self.settings.smoothing)

    def act(self) -> None:
        """Choose what is kept where it is time, and hold the choice in the last steps."""
        self.step += 1
        start, settle = round(self.settings.start * self.steps), round(self.settings.settle * self.steps)
        final = max(1, self.steps - settle)
        if self.step == final or (start <= self.step < final and not self.step % self.settings.every):
            # the last choice is the last: what start and settle leave after rounding may be no step at all
            falling = budget_at(self.step, self.first, self.last, start, settle, self.steps)
            self._choose(self.last if self.step == final else falling)
        elif self.step > final:
            self._prune()

    def finish(self) -> None:
        """Choose what the budget pays for where the fit stopped before the last choice."""
        if int(self._costs[self.kept].sum()) > self.last:
            self._choose(self.last)

    def readings(self) -> dict[str, float]:
        """Return how many units are kept."""
        return {f"ranks/{self.settings.unit}": float(self._costs[self.kept].sum())}

    def state(self) -> dict[str, Any]:
        """Return step, choice and sensitivities."""
        terms = {f"{name}/{key}": t for name, each in self.terms.items() for key, t in each.state_dict().items()}
        return {"step": self.step, "kept": self.kept.clone(), "terms": terms}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take step, choice and sensitivities."""
        own = self.state()["terms"]
        shapes = {name: tensor.shape for name, tensor in state["terms"].items()}
        if shapes != {name: tensor.shape for name, tensor in own.items()}:
            raise ValueError(
                "the ranks in this checkpoint belong to other adapters; resume with the same model settings"
            )
        for name, tensor in own.items():
            tensor.copy_(state["terms"][name])
        self.step, self.kept = int(state["step"]), state["kept"].cpu().clone()

    def _terms(self, site: Site, bank: LoRABank) -> Iterable[tuple[str, Terms]]:
        cost = cost_of(site) if self.settings.unit == "parameters" else 1
        rows = bank.expert_rows()
        for part in ("shared", "expert"):
            down, up = (getattr(bank, f"{part}_{name}") for name in ("down", "up"))
            if down is not None:
                owner = rows.get(f"{part}_down", torch.zeros(len(down), dtype=torch.long))
                yield f"{site.path}/{part}", Terms(down, up, owner, cost)

    def _choose(self, budget: int) -> None:
        self.kept = highest(torch.cat([t.scores() for t in self.terms.values()]), self._costs, budget)
        self._prune()

    def _prune(self) -> None:
        sizes = [len(terms.owner) for terms in self.terms.values()]
        for terms, kept in zip(self.terms.values(), torch.split(self.kept, sizes), strict=True):
            terms.prune(kept)
