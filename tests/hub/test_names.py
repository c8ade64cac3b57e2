"""Names that others give to tensors and modules, and those of older versions of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration

from moadapt import compose
from moadapt.hub import examine
from moadapt.hub.key_names import parse_key
from moadapt.hub.module_names import ModuleNames
from moadapt_routers import ByTask
from tests.core.zoo import ROPE, TEXT, batch_of, build, config
from tests.hub.trained import by_peft, outputs, saved
from tests.models import tiny_llama, tiny_llava

PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WORDS = {"input_ids": torch.arange(5, 23).reshape(2, 9)}
LLAVA = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
NO_LEVEL = {**LLAVA, "model.vision_tower.": "vision_tower."}
QWEN = {"model.language_model.": "model.", "model.visual.": "visual."}
MLLAMA = {**LLAVA, "model.vision_model.": "vision_model."}
OLD: dict[str, dict[str, str]] = {
    "llava": LLAVA,
    "llava_next": LLAVA,
    "llava_onevision": LLAVA,
    "llava_pixtral": NO_LEVEL,
    "paligemma": LLAVA,
    "gemma3": LLAVA,
    "internvl": NO_LEVEL,
    "mllama": MLLAMA,
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
}
"""How module paths of before 4.52 begin, by how they begin now."""


def base_of(name: str) -> PreTrainedModel:
    if name != "qwen2_vl":
        return build(name)
    torch.manual_seed(0)
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    made = config("qwen2_vl", vision_config=vision, text_config={**TEXT, "rope_parameters": ROPE})
    return Qwen2VLForConditionalGeneration(made).eval()


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of a folder other names."""
    found = load_file(folder / TENSORS)
    save_file({change(key): tensor for key, tensor in found.items()}, folder / TENSORS)


def before(path: str, pairs: dict[str, str]) -> str:
    """Return the name that a module, or a tensor of it, had then."""
    return next((old + path.removeprefix(new) for new, old in pairs.items() if path.startswith(new)), path)


@pytest.mark.parametrize("name", OLD)
def test_every_module_is_found_under_the_name_that_it_had(name: str) -> None:
    base = base_of(name)
    names = ModuleNames(base)
    linear = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    then = {path: before(path, OLD[name]) for path in linear}
    assert sum(path != old for path, old in then.items()) >= 10
    assert {path: names.find(old) for path, old in then.items()} == {path: path for path in linear}


@pytest.mark.parametrize(
    ("name", "targets", "regex"),
    [
        ("llava", ["q_proj", "linear_1"], r"(language_model\.model|vision_tower)\..*\.q_proj"),
        ("qwen2_5_vl", ["q_proj", "qkv"], r"(model\.layers|visual)\..*\.(q_proj|qkv)"),
        ("paligemma", ["q_proj", "linear"], r"(language_model|vision_tower)\..*\.q_proj"),
    ],
)
@pytest.mark.parametrize("by", ["names", "regex"])
def test_an_adapter_of_an_older_layout_does_what_it_did(
    name: str, targets: list[str], regex: str, by: str, tmp_path: Path
) -> None:
    batch = batch_of(name)
    chosen: Any = targets if by == "names" else rf".*\.({'|'.join(targets[:1] + targets[1:] * ('qkv' in targets))})"
    folder = saved(tmp_path / "it", base_of(name), target_modules=chosen, r=2)
    expected = by_peft(folder, base_of(name), batch)
    renamed(folder, lambda key: PREFIX + before(key.removeprefix(PREFIX), OLD[name]))
    if by == "regex":
        stored = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**stored, "target_modules": regex}))
    base = base_of(name)
    fates = examine(folder, base)[0].counts
    assert set(fates) == {"renamed"}
    mixture = compose(base, {"it": folder}, router=ByTask()).eval()
    torch.testing.assert_close(outputs(mixture, batch, task="it"), expected, rtol=1e-5, atol=1e-5)


STYLES: dict[str, Callable[[str], str]] = {
    "adapter within": lambda key: key.replace(".weight", ".default.weight"),
    "another adapter within": lambda key: key.replace(".weight", ".my_lora.weight"),
    "without prefix": lambda key: key.removeprefix(PREFIX),
    "of the inner model": lambda key: key.removeprefix(PREFIX + "model."),
    "twice the prefix": lambda key: PREFIX + key,
    "of a compiled model": lambda key: "_orig_mod." + key,
    "of ddp": lambda key: "module." + key,
    "of an older diffusers": lambda key: (
        "text_encoder."
        + key.removeprefix(PREFIX).replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up")
    ),
    "of diffusers": lambda key: key.removeprefix(PREFIX).replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "of kohya": lambda key: kohya(key.removeprefix(PREFIX)),
}


def kohya(key: str) -> str:
    path, _, part = key.partition(".lora_")
    return f"lora_te_{path.replace('.', '_')}.lora_{'down' if part[0] == 'A' else 'up'}.weight"


@pytest.mark.parametrize("name", STYLES)
def test_names_of_other_writers_are_read(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "it", tiny_llama(), target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5)
    expected = by_peft(folder, tiny_llama(), WORDS)
    renamed(folder, STYLES[name])
    mixture = compose(tiny_llama(), {"it": folder}, router=ByTask()).eval()
    torch.testing.assert_close(outputs(mixture, WORDS, task="it"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_file_of_kohya_needs_no_configuration(place: str, tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "peft", tiny_llama(), target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6,
        rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3},
    )  # fmt: skip
    expected = by_peft(folder, tiny_llama(), WORDS)
    found = {kohya(key.removeprefix(PREFIX)): t for key, t in load_file(folder / TENSORS).items()}
    for key in [key for key in found if "lora_down" in key]:
        found[key.replace("lora_down.weight", "alpha")] = torch.tensor(3.0 if "v_proj" in key else 6.0)
    (tmp_path / "kohya").mkdir()
    file = tmp_path / "kohya" / "last.safetensors"
    save_file(found, file)
    source = file if place == "file" else file.parent
    mixture = compose(tiny_llama(), {"it": source}, router=ByTask()).eval()
    torch.testing.assert_close(outputs(mixture, WORDS, task="it"), expected, rtol=1e-5, atol=1e-5)


def test_names_of_servers_for_a_language_tower_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "it", tiny_llava(), target_modules=r".*language_model.*\.q_proj")
    renamed(folder, lambda key: before(key.removeprefix(PREFIX), LLAVA))
    paths = {key.target for key in examine(folder, tiny_llava())[0].keys}
    assert paths == {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(3)}


def test_what_may_be_two_modules_is_refused() -> None:
    base: Any = nn.Module()
    base.base_model_prefix = ""
    base.a = nn.Module()
    base.a.b_c = nn.Linear(1, 1)
    base.a_b = nn.Module()
    base.a_b.c = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"lora_te_a_b_c may be a\.b_c or a_b\.c; ask for a file in peft's form"):
        ModuleNames(base).find("lora_te_a_b_c")


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "it", tiny_llama(), target_modules=["q_proj"])
    renamed(folder, lambda key: key.replace(".weight", f".{'a' if 'layers.1' in key else 'b'}.weight"))
    with pytest.raises(ValueError, match="holds several adapters, a, b; ask for a file of each"):
        compose(tiny_llama(), {"it": folder}, router=ByTask())


@pytest.mark.parametrize("key", ["q_proj", "", "a" * 2000, "q_proj.lora_A", "q_proj.lora_A.a.b.c"])
def test_names_of_nothing_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"no tensor of a LoRA|more than any module's"):
        parse_key(key)
