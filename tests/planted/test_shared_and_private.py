"""Four tasks that have a rank-2 change in common and a rank-1 change each, from 24 noisy samples a task."""

import pytest
import torch
from torch import Tensor

from moadapt import Routing
from moadapt.objectives import Orthogonality
from tests.planted.toy import OneSite, fit, orthonormal

WIDE, NARROW, TASKS, SAMPLES, NOISE, SEEDS = 12, 24, 4, 24, 0.04, 3
RANKS = {
    "shared and own": {"shared": 2, **{f"own{task}": 1 for task in range(TASKS)}},
    "one": {"shared": 6},
    "each its own": {f"own{task}": 3 for task in range(TASKS)},
}


def run(seed: int, kind: str, apart: Orthogonality | None = None) -> tuple[int, float, float]:
    """Return how many parameters there are, the relative error of the deltas, and the angle to the common rows."""
    torch.manual_seed(seed)
    rows = orthonormal(2, WIDE)
    common = orthonormal(2, NARROW).T @ rows
    deltas = torch.stack([common + orthonormal(1, NARROW).T @ orthonormal(1, WIDE) for _ in range(TASKS)])
    x = torch.randn(TASKS, SAMPLES, WIDE)
    y = torch.einsum("bnd,bfd->bnf", x, deltas) + NOISE * torch.randn(TASKS, SAMPLES, NARROW)
    toy = OneSite(RANKS[kind], WIDE, NARROW)
    routing = None if kind == "one" else Routing.of_rows(torch.arange(TASKS), TASKS)

    def loss() -> Tensor:
        plain = (toy.bank(x, torch.zeros_like(y), routing) - y).square().mean()
        return plain if apart is None else plain + apart.weight * apart.value(toy)

    fit(toy.bank, loss)
    found = torch.stack([toy.bank.delta(torch.eye(TASKS)[task]).weight() for task in range(TASKS)])
    error = ((found - deltas).square().sum(dim=(1, 2)) / deltas.square().sum(dim=(1, 2))).mean().item()
    angle = float("nan")
    if kind == "shared and own":
        basis = torch.linalg.qr(toy.bank.state("shared")["down"].T).Q
        angle = torch.linalg.svdvals(rows @ basis).min().clamp(max=1).acos().rad2deg().item()
    return sum(p.numel() for p in toy.bank.parameters()), error, angle


@pytest.mark.slow
def test_shared_and_own_adapters_find_what_is_common_and_what_is_not() -> None:
    apart = Orthogonality(weight=0.01)
    cases = {
        "shared and own": [run(seed, "shared and own") for seed in range(SEEDS)],
        "shared and own, apart": [run(seed, "shared and own", apart) for seed in range(SEEDS)],
        "one": [run(seed, "one") for seed in range(SEEDS)],
        "each its own": [run(seed, "each its own") for seed in range(SEEDS)],
    }
    for name, runs in cases.items():
        print(name, *(f"{count} parameters, error {error:.4f}, angle {angle:.2f};" for count, error, angle in runs))
    counts, errors = ({n: [r[i] for r in runs] for n, runs in cases.items()} for i in (0, 1))
    assert {name: set(count) for name, count in counts.items()} == {
        "shared and own": {216}, "shared and own, apart": {216}, "one": {216}, "each its own": {432},
    }  # fmt: skip
    for name in ("shared and own", "shared and own, apart"):
        assert max(errors[name]) < 0.0025
        assert max(angle for _, _, angle in cases[name]) < 2
    assert 0.002 < min(errors["each its own"]) <= max(errors["each its own"]) < 0.006
    assert 0.2 < min(errors["one"]) <= max(errors["one"]) < 0.4
