"""A mixture whose experts are of four families, its shared adapter of a fifth, trains, saves, loads and generates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import load
from moadapt.adapters import Bias, Bottleneck, CrossModal, LoRA, Prefix
from moadapt.bases import load_base
from moadapt.router import RouterSpec
from moadapt.training import MixedTasks, MixtureModule, Optimization
from moadapt_routers import Softmax, TopK
from tests.training import toy
from tests.training.runs import trainer

EXPERTS = {
    "low_rank": LoRA(rank=2),
    "narrow": Bottleneck(width=3),
    "gated": Prefix(length=3, image_length=2),
    "crossing": CrossModal(rank=3),
}


def module_of(kind: type[MixtureModule], base: str, router: RouterSpec) -> MixtureModule:
    torch.manual_seed(0)
    settings = Optimization(learning_rate=2e-2, router_learning_rate=1e-2)
    module = kind(base, dict(EXPERTS), Bias(create=True), router, optimization=settings)
    module.configure_model()
    return module


def fit(module: MixtureModule, base: str, folder: Path, **options: Any) -> None:
    """Train four steps."""
    tasks = MixedTasks(base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=4)
    trainer(folder, max_steps=4, limit_val_batches=0, **options).fit(module, datamodule=tasks)


def prompts(folder: Path, base: str) -> dict[str, Tensor]:
    tasks = MixedTasks(base, toy.toy_tasks(folder, rows=(6, 6)), eval_batch_size=4)
    tasks.setup("predict")
    return dict(next(iter(tasks.predict_dataloader())).inputs)


@pytest.mark.parametrize("router", [TopK(k=2), Softmax(scope="token")], ids=["sequence", "token"])
def test_four_families_train_save_load_and_generate(router: RouterSpec, base: str, tmp_path: Path) -> None:
    module = module_of(MixtureModule, base, router)
    before = {name: tensor.clone() for name, tensor in module.tensors().items()}
    fit(module, base, tmp_path)
    moved = {name.split("/")[1] for name, tensor in module.tensors().items() if not torch.equal(tensor, before[name])}
    assert moved >= {*EXPERTS, "shared"}
    mixture = module.mixture.eval()

    mixture.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", load_base(base)[0]).eval()
    prompt = prompts(tmp_path, base)
    with torch.no_grad():
        assert torch.equal(loaded(**prompt).logits, mixture(**prompt).logits)

    how = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    written = loaded.generate(**prompt, **how)
    assert torch.equal(written, mixture.generate(**prompt, **how, use_cache=False))


def test_two_processes_train_four_families_as_one_does(base: str, tmp_path: Path) -> None:
    def end(processes: int) -> dict[str, Tensor]:
        result = tmp_path / f"{processes}.pt"
        strategy = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if processes == 2 else {}

        class Recording(MixtureModule):
            def on_train_end(self) -> None:
                if self.global_rank == 0:
                    torch.save(self.state_dict(), result)

        module = module_of(Recording, base, TopK(k=2))
        for parameter in module.roles():  # so that every gradient is there from the first step on
            torch.nn.init.normal_(parameter, std=0.1)
        fit(module, base, tmp_path, precision="64-true", **strategy)
        return dict(torch.load(result, weights_only=True))

    one, two = end(1), end(2)
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # routers and pooled features are float32 by design
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6, msg=name)
