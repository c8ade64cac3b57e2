"""Planted sites are found: of eight layers with a LoRA each, the teacher differs from the base at 2 and 5 alone."""

import pytest
import torch
from torch import Tensor, nn

from moadapt.adapters import LoRA
from moadapt.adapters.bank import Adapter
from moadapt.adapters.lora_bank import LoRABank
from moadapt.ranks import Gates
from moadapt.sites import Site

WIDTH, ROWS, LAYERS, STEPS = 16, 64, 8, 300
PLANTED = [2, 5]


class Net(nn.Module):
    """Residual layers of a frozen linear map, with something added to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(LAYERS))
        self.sites = [Site(f"layers.{i}", "language", "mlp", i, WIDTH, WIDTH) for i in range(LAYERS)]
        adapter = Adapter("shared", LoRA(rank=4), None)
        self.banks = [LoRABank(site, [adapter], layer) for site, layer in zip(self.sites, self.layers, strict=True)]

    def student(self, x: Tensor) -> Tensor:
        for layer, bank in zip(self.layers, self.banks, strict=True):
            x = x + torch.tanh(bank.add_to(layer(x), x, None))
        return x

    def teacher(self, x: Tensor, deltas: dict[int, Tensor]) -> Tensor:
        for index, layer in enumerate(self.layers):
            added = x @ deltas[index].T if index in deltas else 0.0
            x = x + torch.tanh(layer(x) + added)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("settings", [{"price": 0.1, "budget": 1.0}, {"price": 0.0, "budget": 0.25}], ids=str)
def test_gates_find_the_layers_that_matter(settings: dict[str, float], seed: int) -> None:
    torch.manual_seed(seed)
    net, generator = Net(), torch.Generator().manual_seed(seed)

    def directions() -> Tensor:
        return torch.linalg.qr(torch.randn(WIDTH, 2, generator=generator))[0]

    deltas = {layer: directions() @ directions().T for layer in PLANTED}
    optimizer = torch.optim.AdamW([p for bank in net.banks for p in bank.parameters()], lr=1e-2)
    driver = Gates(**settings).driver(zip(net.sites, net.banks, strict=True), STEPS)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(1, ROWS, WIDTH, generator=generator)
        loss = (net.student(x) - net.teacher(x, deltas)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        driver.observe()
        optimizer.step()
        driver.act()
        losses.append(float(loss.detach()))
    told = " ".join(f"{gate:.2f}" for gate in driver.gates.tolist())
    print(f"{settings}, seed {seed}: gates {told}; loss {losses[0]:.3f} to {losses[-1]:.1e}")
    assert driver.kept.nonzero().flatten().tolist() == PLANTED
    assert losses[-1] < 0.01 * losses[0]
