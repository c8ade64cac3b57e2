"""Planted ranks are recovered: loss floors by rank, and importance that follows what was planted.

A linear teacher adds a delta of known rank at each layer; students see whitened inputs, so that the loss of a rank-k
student is at best the sum of the squared singular values it must drop.
"""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from moadapt.adapters import LoRA
from moadapt.adapters.bank import Adapter
from moadapt.adapters.lora_bank import LoRABank
from moadapt.ranks import Importance
from moadapt.sites import Site

WIDTH, ROWS, STEPS = 16, 64, 600
SEEDS = (0, 1, 2)


def layers(ranks: Iterable[int]) -> list[tuple[Site, LoRABank]]:
    """One bank a layer, each with a shared LoRA of such a rank."""
    found = []
    for layer, rank in enumerate(ranks):
        site = Site(f"layers.{layer}", "language", "mlp", layer, WIDTH, WIDTH)
        found.append((site, LoRABank(site, [Adapter("shared", LoRA(rank=rank), None)], nn.Linear(WIDTH, WIDTH))))
    return found


def teacher(rank: int, generator: torch.Generator, values: Tensor | None = None) -> Tensor:
    """A delta of random directions with these singular values, by default all 1."""
    left, right = (torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator))[0] for _ in range(2))
    return left * (torch.ones(rank) if values is None else values) @ right.T


def train(banks: list[tuple[Site, LoRABank]], deltas: list[Tensor], seed: int, settings: Importance | None) -> None:
    """Fit each bank to its layer's delta on fresh rows of white noise."""
    generator = torch.Generator().manual_seed(100 + seed)
    optimizer = torch.optim.AdamW([p for _, b in banks for p in b.parameters()], lr=1e-2, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    driver = None if settings is None else settings.driver(banks, STEPS)
    for _ in range(STEPS):
        loss = torch.zeros(())
        for (_, bank), delta in zip(banks, deltas, strict=True):
            x = torch.randn(1, ROWS, WIDTH, generator=generator)
            loss = loss + (bank(x, torch.zeros_like(x), None) - x @ delta.T).square().sum() / ROWS
        optimizer.zero_grad()
        loss.backward()
        if driver is not None:
            driver.observe()
        optimizer.step()
        falling.step()
        if driver is not None:
            driver.act()


@torch.no_grad()
def error(bank: LoRABank, delta: Tensor) -> float:
    """Expected loss on whitened inputs: the squared distance between deltas."""
    return float((bank.delta(torch.zeros(0)).weight() - delta).square().sum())


def live(bank: LoRABank) -> int:
    return int(bank.state("shared")["up"].any(dim=1).sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_floor_is_the_sum_of_the_dropped_squared_singular_values(seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.arange(8, 0, -1) / 4
    ranks = (1, 2, 4, 6, 8)
    banks = layers(ranks)
    delta = teacher(8, torch.Generator().manual_seed(seed), values)
    train(banks, [delta] * len(ranks), seed, None)
    for rank, (_, bank) in zip(ranks, banks, strict=True):
        floor, found = float(values[rank:].square().sum()), error(bank, delta)
        print(f"seed {seed}, rank {rank}: floor {floor:.4f}, found {found:.4f}")
        assert found == pytest.approx(floor, rel=0.02, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_importance_finds_the_planted_ranks(seed: int) -> None:
    torch.manual_seed(seed)
    planted = (8, 1)
    generator = torch.Generator().manual_seed(seed)
    deltas = [teacher(rank, generator) for rank in planted]
    banks = layers((8, 8))
    train(banks, deltas, seed, Importance(budget=sum(planted)))
    print(f"seed {seed}: planted {planted}, found {[live(bank) for _, bank in banks]}")
    assert tuple(live(bank) for _, bank in banks) == planted


@pytest.mark.slow
def test_adaptive_ranks_beat_uniform_ones_of_the_same_budget() -> None:
    planted, totals = (6, 4, 1, 1), {"uniform": 0.0, "adaptive": 0.0}
    for seed in SEEDS:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        deltas = [teacher(rank, generator) for rank in planted]
        students = {"uniform": layers((3, 3, 3, 3)), "adaptive": layers((6, 6, 6, 6))}
        train(students["uniform"], deltas, seed, None)
        train(students["adaptive"], deltas, seed, Importance(budget=12, start=0.3))
        found = [live(bank) for _, bank in students["adaptive"]]
        errors = {n: sum(error(b, d) for (_, b), d in zip(own, deltas, strict=True)) for n, own in students.items()}
        print(f"seed {seed}: uniform {errors['uniform']:.3f}, adaptive {errors['adaptive']:.3f} with {found}")
        # three terms are missing at the first layer and one at the second, each with a squared singular value of 1
        assert errors["uniform"] == pytest.approx(4, rel=0.02)
        assert sum(found) == sum(planted)
        totals = {name: total + errors[name] for name, total in totals.items()}
    assert totals["adaptive"] < totals["uniform"] / 2
