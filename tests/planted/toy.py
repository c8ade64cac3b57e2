"""What planted experiments share: random orthonormal rows, a bank on a plain linear site, a fit to the bottom."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moadapt.adapters import Adapter, Bank, LoRA
from moadapt.sites import Site


class OneSite:
    """What a mixture is to an objective: banks with their sites.

    Args:
        ranks: Rank of every LoRA by name; `shared` is the shared adapter, the others are experts in order.
        wide: D.
        narrow: F.
    """

    def __init__(self, ranks: dict[str, int], wide: int, narrow: int) -> None:
        self.site = Site("linear", "language", "attention", 0, wide, narrow)
        experts = [name for name in ranks if name != "shared"]
        adapters = [
            Adapter(name, LoRA(rank=rank), None if name == "shared" else experts.index(name))
            for name, rank in ranks.items()
        ]
        self.bank = LoRA.bank(self.site, adapters, nn.Linear(wide, narrow))

    def banks(self) -> Iterator[tuple[Site, Bank]]:
        yield self.site, self.bank


def orthonormal(rows: int, width: int) -> Tensor:
    """Random orthonormal rows, (rows, width)."""
    return torch.linalg.qr(torch.randn(width, rows)).Q.T


def fit(bank: Bank, loss: Callable[[], Tensor], steps: int = 300) -> None:
    """Minimise a loss over what a bank trains."""
    trained = [p for p in bank.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(trained, max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
