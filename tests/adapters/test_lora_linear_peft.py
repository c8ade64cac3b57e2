"""LoRA at fused and transposed linear layers against the peft library, and exported to it."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import moadapt
from moadapt import Placement
from moadapt.adapters import LoRA
from tests.core.zoo import batch_of, build
from tests.models import randomize


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=67, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


def inputs(name: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(1, 60, (2, 6))} if name == "gpt2" else batch_of(name)


CASES: dict[str, tuple[Any, tuple[str, ...], Placement]] = {
    "gpt2": (gpt2, ("c_attn", "c_proj", "c_fc"), Placement(modules=("c_attn", "c_proj", "c_fc"))),
    "qwen2_5_vl": (lambda: build("qwen2_5_vl"), ("qkv",), Placement(towers=("vision",), modules=("qkv",))),
}


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_peft(name: str, rank_stabilized: bool) -> None:
    make, targets, placement = CASES[name]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(targets), use_rslora=rank_stabilized, init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    other: Any = peft.get_peft_model(make(), config).eval()
    mixture = moadapt.attach(make(), shared=LoRA(rank=3, alpha=5, rank_stabilized=rank_stabilized, placement=placement))
    pairs = []
    for site, bank in mixture.banks():
        theirs = [other.get_parameter(f"base_model.model.{site.path}.lora_{s}.default.weight") for s in "AB"]
        bank.load_state("shared", {"down": theirs[0], "up": theirs[1].T})
        pairs += [(bank.get_parameter("shared_down"), theirs[0]), (bank.get_parameter("shared_up"), theirs[1])]
    assert pairs
    ours, expected = mixture(**inputs(name)).logits, other(**inputs(name)).logits
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * float(expected.detach().abs().max()))
    ours.square().mean().backward()
    expected.square().mean().backward()
    for (mine, theirs_), side in zip(pairs, "AB" * (len(pairs) // 2), strict=True):
        assert mine.grad is not None
        wanted = theirs_.grad if side == "A" else theirs_.grad.T
        torch.testing.assert_close(mine.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_an_exported_folder_gives_the_merged_logits(name: str, tmp_path: Path) -> None:
    make, _, placement = CASES[name]
    mixture = moadapt.attach(make(), shared=LoRA(rank=3, alpha=5, placement=placement)).eval()
    randomize(mixture, 0.2)
    mixture.export_peft(tmp_path / "lora")
    plain, _ = mixture.merge("task")
    loaded = peft.PeftModel.from_pretrained(make(), str(tmp_path / "lora"))
    with torch.no_grad():
        routed = mixture(**inputs(name)).logits
        for other in (plain, loaded):
            torch.testing.assert_close(other(**inputs(name)).logits, routed, rtol=1e-5, atol=1e-5)
