"""Trimmed mixtures compute what they did, on disk and in the peft library too."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from moadapt import Mixture, Placement, attach, load
from moadapt.adapters import Bottleneck, LoRA
from moadapt.adapters.lora_bank import LoRABank
from moadapt.ranks import trim_ranks
from moadapt_routers import ByTask, Softmax
from tests.models import llava_batch, randomize, tiny_llava

TASKS = ["a", "b", "a"]
PATHS = ("model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.mlp.up_proj")


def pruned(router: object) -> Mixture:
    """Random adapters of which terms are pruned: all of them at the first path, and all of b's at the second."""
    mixture = attach(
        tiny_llava(),
        shared=LoRA(rank=4, alpha=7),
        experts={"a": LoRA(rank=3, rank_stabilized=True), "b": LoRA(rank=2, alpha=1, ranks={PATHS[1]: 5})},
        router=router,
        placement=Placement(towers=("vision", "language")),
    )
    randomize(mixture, 0.2)
    generator = torch.Generator().manual_seed(3)
    for site, bank in mixture.banks():
        for name in bank.names:
            state = bank.state(name)
            gone = torch.rand(len(state["up"]), generator=generator) < 0.4
            state["up"][gone | (site.path == PATHS[0]) | (site.path == PATHS[1] and name == "b")] = 0
            bank.load_state(name, state)
    return mixture


def logits(model: nn.Module, **extra: object) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**llava_batch(), **extra).logits
    return found


@pytest.mark.parametrize("router", [ByTask(), Softmax(per="site")], ids=["task", "softmax"])
def test_a_trimmed_mixture_computes_the_same_with_fewer_parameters(router: object, tmp_path: Path) -> None:
    mixture = pruned(router).double()
    count = sum(p.numel() for _, p in mixture.named_adapter_parameters())
    live = {
        (site.path, name): int(bank.state(name)["up"].any(dim=1).sum())
        for site, bank in mixture.banks()
        for name in bank.names
    }
    expected = logits(mixture, task=TASKS)
    trimmed = trim_ranks(mixture)
    torch.testing.assert_close(logits(trimmed, task=TASKS), expected, rtol=1e-6, atol=1e-6)
    found = {(site.path, name): len(bank.state(name)["up"]) for site, bank in trimmed.banks() for name in bank.names}
    assert found == {place: rank for place, rank in live.items() if rank}
    assert sum(p.numel() for _, p in trimmed.named_adapter_parameters()) < count
    trimmed.save(tmp_path / "mixture")
    assert torch.equal(
        logits(load(tmp_path / "mixture", tiny_llava().double()), task=TASKS), logits(trimmed, task=TASKS)
    )


def test_a_trimmed_mixture_exports_with_patterns_and_equal_logits(tmp_path: Path) -> None:
    mixture = pruned(ByTask())
    expected = logits(mixture, task=["a"] * 3)
    trim_ranks(mixture).export_peft(tmp_path / "lora", task="a")
    loaded = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    config = loaded.peft_config["default"]
    assert config.alpha_pattern == config.rank_pattern != {}
    assert PATHS[0] not in config.target_modules


def test_frozen_adapters_stay_frozen_and_other_families_stay_whole(tmp_path: Path) -> None:
    mixture = attach(tiny_llava(), shared=LoRA(rank=3), experts={"other": Bottleneck()}, router=ByTask())
    randomize(mixture, 0.2)
    for _, bank in mixture.banks():
        if isinstance(bank, LoRABank):
            state = bank.state("shared")
            state["up"][1] = 0
            bank.load_state("shared", state)
            bank.freeze("shared")
    expected = logits(mixture, task=["other"] * 3)
    trimmed = trim_ranks(mixture)
    torch.testing.assert_close(logits(trimmed, task=["other"] * 3), expected, rtol=1e-6, atol=1e-6)
    assert {bank.frozen for _, bank in trimmed.banks() if isinstance(bank, LoRABank)} == {frozenset({"shared"})}


def test_what_cannot_be_trimmed_is_refused_and_stays_attached() -> None:
    mixture = attach(tiny_llava(), experts={"a": LoRA()}, router=ByTask())
    with pytest.raises(ValueError, match="no expert sits anywhere"):
        trim_ranks(mixture)
    assert mixture.attached
    mixture.detach()
    with pytest.raises(ValueError, match="detached from its base, so there is nothing to trim"):
        trim_ranks(mixture)


def test_a_mixture_that_would_lose_every_adapter_is_refused() -> None:
    mixture = attach(tiny_llava(), shared=LoRA(rank=2))
    with pytest.raises(ValueError, match="every adapter's `up` is zero, so trimming would leave none"):
        trim_ranks(mixture)
    assert mixture.attached


def test_a_trimmed_mixture_checkpoints_like_the_one_it_came_from() -> None:
    mixture = pruned(ByTask())
    assert not mixture.checkpoints
    mixture.gradient_checkpointing_enable()
    trimmed = trim_ranks(mixture.train())
    assert trimmed.checkpoints
    assert any(getattr(module, "gradient_checkpointing", False) for module in trimmed.base.modules())
