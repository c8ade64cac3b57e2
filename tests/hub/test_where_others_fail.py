"""What other libraries get wrong with several adapters, each with the right outcome."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moadapt import compose
from moadapt_routers import ByTask, Constant
from tests.hub.trained import BASES, by_peft, outputs, saved
from tests.models import llava_batch, prompt_of, rows_of, tiny_llama, tiny_llava, uneven_images

WORDS = {"input_ids": torch.arange(5, 23).reshape(2, 9)}


def changes(folder: Path, scale: float) -> dict[str, Tensor]:
    """What a LoRA adds to each weight, by the path of its module, multiplied out."""
    found = load_file(folder / "adapter_model.safetensors")
    downs = {key: t for key, t in found.items() if "lora_A" in key}
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * found[key.replace("lora_A", "lora_B")].double()
        @ down.double()
        for key, down in downs.items()
    }


def test_a_weighted_sum_of_rslora_adapters_has_the_scale_of_each(tmp_path: Path) -> None:
    options = {"use_rslora": True, "lora_alpha": 6}
    one = saved(tmp_path / "one", tiny_llama(), r=4, target_modules=["q_proj", "v_proj"], **options)
    two = saved(tmp_path / "two", tiny_llama(), r=9, target_modules=["q_proj", "up_proj"], **options)
    mixture = compose(tiny_llama(), {"one": one, "two": two}, router=Constant(weights=(0.5, -2.0))).eval()
    by_hand = tiny_llama()
    for folder, weight, rank in ((one, 0.5, 4), (two, -2.0, 9)):
        for path, change in changes(folder, weight * 6 / math.sqrt(rank)).items():
            by_hand.get_submodule(path).weight.data += change.float()
    expected = outputs(by_hand, WORDS)
    torch.testing.assert_close(outputs(mixture, WORDS), expected, rtol=1e-5, atol=1e-5)
    mixture.export_peft(tmp_path / "sum", method="mean_routing", calibration=WORDS)
    torch.testing.assert_close(by_peft(tmp_path / "sum", tiny_llama(), WORDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tasks", [["a", "b", "b"], ["b", "a", "a"]])
def test_images_get_the_adapter_of_their_row_where_rows_have_unequal_numbers_of_them(
    tasks: list[str], tmp_path: Path
) -> None:
    targets = r".*vision_tower.*\.(q_proj|v_proj)"
    folders = {
        name: saved(tmp_path / name, tiny_llava(), r=rank, lora_alpha=8 * rank, target_modules=targets)
        for name, rank in (("a", 3), ("b", 5))
    }
    batch = uneven_images(prompt_of(llava_batch()))
    expected = {name: by_peft(folder, tiny_llava(), batch) for name, folder in folders.items()}
    mixture = compose(tiny_llava(), folders, router=ByTask()).eval()
    found = outputs(mixture, batch, task=tasks)
    for row, name in enumerate(tasks):
        torch.testing.assert_close(found[row], expected[name][row], rtol=1e-4, atol=1e-5)
    assert float((expected["a"][0] - expected["b"][0]).abs().max()) > 1e-3


def test_adapters_for_different_targets_stand_beside_each_other(tmp_path: Path) -> None:
    targets = {"names": ["q_proj"], "regex": r".*language_model\.layers\.1\..*_proj", "linear": "all-linear"}
    folders = {name: saved(tmp_path / name, tiny_llava(), r=2, target_modules=t) for name, t in targets.items()}
    batch = llava_batch()
    mixture = compose(tiny_llava(), folders, router=ByTask()).eval()
    together = outputs(mixture, batch, task=["linear", "names", "regex"])
    for row, name in enumerate(["linear", "names", "regex"]):
        alone = by_peft(folders[name], tiny_llava(), rows_of(batch, row))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "targets"), [("bert", ["query", "pooler.dense"]), ("vit", ["q_proj"])])
def test_rows_of_one_batch_get_the_classifiers_of_their_tasks(name: str, targets: list[str], tmp_path: Path) -> None:
    make, batch = BASES[name][0], BASES[name][1]()
    options = {"target_modules": targets, "modules_to_save": ["classifier"]}
    whole = saved(tmp_path / "whole", make(), r=2, **options)
    plain = saved(tmp_path / "plain", make(), r=3, target_modules=targets)
    expected = {"whole": by_peft(whole, make(), batch), "plain": by_peft(plain, make(), batch)}
    mixture = compose(make(), {"whole": whole, "plain": plain}, router=ByTask()).eval()
    for tasks in (["whole", "plain"], ["plain", "whole"]):
        found = outputs(mixture, batch, task=tasks)
        for row, task in enumerate(tasks):
            torch.testing.assert_close(found[row], expected[task][row], rtol=1e-5, atol=1e-5)
