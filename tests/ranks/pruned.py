"""Banks of LoRAs to prune, and small fits that prune them and can be stopped anywhere."""

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from moadapt.adapters import LoRA
from moadapt.adapters.bank import Adapter
from moadapt.adapters.lora_bank import LoRABank
from moadapt.ranks import RankAllocator
from moadapt.sites import Site
from moadapt.training import KeepLast, MixedTasks, MixtureModule, Optimization, Stopped
from moadapt_routers import ByTask
from tests.training import toy
from tests.training.runs import Watch, trainer

WIDE, NARROW, RANK = 6, 4, 3
SHARED, EXPERTS = "shared", ("a", "b")


def banks() -> list[tuple[Site, LoRABank]]:
    """Two sites of different width, each with a shared LoRA of rank 3 and two experts of rank 2."""
    torch.manual_seed(0)
    adapters = [Adapter(SHARED, LoRA(rank=RANK), None), *(Adapter(n, LoRA(rank=2), i) for i, n in enumerate(EXPERTS))]
    found = []
    for layer, width in enumerate((WIDE, NARROW)):
        site = Site(f"blocks.{layer}", "language", "mlp", layer, width, width)
        bank = LoRABank(site, adapters, nn.Linear(width, width)).double()
        for parameter in bank.parameters():
            nn.init.normal_(parameter)
        found.append((site, bank))
    return found


def module(base: str, ranks: RankAllocator) -> MixtureModule:
    """A shared LoRA and two experts of rank 2 at all sites of a base."""
    experts = {"small": LoRA(rank=2), "large": LoRA(rank=2)}
    settings = Optimization(learning_rate=1e-2)
    return MixtureModule(base, experts, LoRA(rank=2), ByTask(), optimization=settings, ranks=ranks)


def fitted(
    folder: Path, base: str, ranks: RankAllocator, at: tuple[str, int] | None = None, **options: Any
) -> MixtureModule | None:
    """Train, from `last.ckpt` where there is one; None where it was stopped."""
    lightning.seed_everything(0, verbose=False)
    made, last = module(base, ranks), folder / "last.ckpt"
    data = MixedTasks(base, toy.toy_tasks(folder.parent), batch_size=3)
    try:
        fit = trainer(folder, Watch(at), KeepLast(folder), limit_val_batches=0, **options)
        fit.fit(made, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    except Stopped:
        return None
    return made


def resumed(folder: Path, base: str, ranks: RankAllocator, at: tuple[str, int], **options: Any) -> dict[str, Tensor]:
    """Train once through and once with a stop; both end alike, and that end is returned."""
    whole = fitted(folder / "whole", base, ranks, **options)
    assert fitted(folder / "stopped", base, ranks, at, **options) is None
    again = fitted(folder / "stopped", base, ranks, **options)
    assert whole is not None
    assert again is not None
    expected, found = whole.state_dict(), again.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return expected
