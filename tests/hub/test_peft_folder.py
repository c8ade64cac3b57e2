"""Exported folders, read by the peft library itself."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import moadapt
from moadapt import Placement
from moadapt.adapters import LoRA
from moadapt.mixture import Mixture
from moadapt_routers import ByTask, Softmax
from tests.models import llava_batch, randomize, tiny_llava

ODD_NAMES = ["1", "q_proj", "vision_tower", "model", "lora_A"]


def attached(names: list[str], router: Any) -> Mixture:
    first, *rest = names
    mixture = moadapt.attach(
        tiny_llava(),
        shared=LoRA(rank=4, alpha=7),
        experts={
            first: LoRA(rank=3, rank_stabilized=True, placement=Placement(towers=("vision", "connector", "language"))),
            **{name: LoRA(rank=2, placement=Placement(depth=(0.3, 1.0))) for name in rest},
        },
        router=router,
    )
    randomize(mixture, 0.1)
    return mixture


@pytest.mark.parametrize("name", ODD_NAMES)
def test_exported_folder_gives_the_merged_logits(name: str, tmp_path: Path) -> None:
    mixture, batch = attached([name, "other"], ByTask()), llava_batch()
    report = mixture.export_peft(tmp_path / "lora", task=name)
    plain, _ = mixture.merge("task", task=name)
    loaded = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path / "lora"))
    assert report.exact
    torch.testing.assert_close(loaded(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)


def test_export_of_a_mean_routing_gives_the_merged_logits(tmp_path: Path) -> None:
    mixture, batch = attached(["a", "b"], Softmax()), llava_batch()
    report = mixture.export_peft(tmp_path / "lora", method="mean_routing", calibration=batch)
    plain, _ = mixture.merge("mean_routing", calibration=batch)
    loaded = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path / "lora"))
    assert not report.exact
    torch.testing.assert_close(loaded(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["a.b", "../up", "a/b", "", "-x", "shared", "x" * 65])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="adapter name"):
        moadapt.attach(tiny_llava(), experts={name: LoRA()}, router=ByTask())


def test_export_of_an_untrained_mixture_is_refused(tmp_path: Path) -> None:
    mixture = moadapt.attach(tiny_llava(), shared=LoRA(rank=2))
    with pytest.raises(ValueError, match="every delta is zero"):
        mixture.export_peft(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
