"""What peft saves, we compose to the same outputs; what we export, peft loads to the same outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt import compose
from moadapt.adapters import LoRA
from moadapt_routers import ByTask
from tests.hub.trained import BASES, by_peft, outputs, saved

SELF = ["q_proj", "v_proj"]
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": SELF}),
    "alpha": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": SELF}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": SELF}),
    "patterns": (
        "llama",
        {
            "r": 4, "lora_alpha": 6, "target_modules": [*SELF, "down_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"down_proj": 5, r".*\.2\.self_attn\.q_proj": 1},
        },
    ),
    "patterns_rslora": (
        "llama", {"r": 4, "use_rslora": True, "target_modules": SELF, "rank_pattern": {"v_proj": 9}},
    ),
    "lora_bias": ("gpt2", {"r": 3, "lora_alpha": 5, "lora_bias": True, "target_modules": ["c_attn", "c_fc"]}),
    "fan_in_fan_out": ("gpt2", {"r": 3, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}),
    "layers": ("llama", {"target_modules": SELF, "layers_to_transform": [0, 2]}),
    "one_layer_by_pattern": (
        "llama", {"target_modules": SELF, "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "excluded": ("llava", {"target_modules": SELF, "exclude_modules": r".*vision_tower.*"}),
    "both_towers": ("llava", {"target_modules": SELF, "lora_alpha": 16}),
    "regex": ("llava", {"target_modules": r".*language_model.*\.(q|o)_proj|.*projector\.linear_1"}),
    "all_linear": ("llava", {"target_modules": "all-linear", "r": 2}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3}),
    "embedding_and_head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "conv2d": ("llava", {"target_modules": ["patch_embedding", "q_proj"], "r": 3, "lora_alpha": 5}),
    "whole_head": ("llama", {"target_modules": SELF, "modules_to_save": ["lm_head"], "lora_alpha": 5}),
    "whole_embedding": ("llama", {"target_modules": SELF, "modules_to_save": ["embed_tokens"]}),
    "text_classes": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_alpha": 3}),
    "image_classes": ("vit", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "lora_alpha": 3}),
    "gaussian": ("llama", {"target_modules": SELF, "init_lora_weights": "gaussian"}),
    "pissa": ("llama", {"target_modules": SELF, "init_lora_weights": "pissa", "r": 4, "lora_alpha": 6}),
    "olora": ("llama", {"target_modules": SELF, "init_lora_weights": "olora", "r": 4, "lora_alpha": 6}),
}  # fmt: skip
over_options = pytest.mark.parametrize("name", OPTIONS)
over_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def prepared(name: str, dtype: torch.dtype, folder: Path) -> tuple[Any, Any, Path]:
    """How to make the base, a batch for it, and a folder that peft saved."""
    base, options = OPTIONS[name]
    make, batch = BASES[base]
    return make, batch(), saved(folder, make(), dtype=dtype, **options)


@over_types
@over_options
def test_a_folder_of_peft_composed_alone_gives_its_outputs(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, batch, folder = prepared(name, dtype, tmp_path / "peft")
    expected = by_peft(folder, make(), batch)
    base = make()
    before = outputs(base, batch)
    mixture = compose(base, {"it": folder}, router=ByTask()).eval()
    assert float((expected - before).abs().max()) > 1e-3
    torch.testing.assert_close(outputs(mixture, batch, task="it"), expected, rtol=1e-5, atol=1e-5)


@over_types
@over_options
def test_what_is_exported_is_loaded_by_peft(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, batch, folder = prepared(name, dtype, tmp_path / "peft")
    mixture = compose(make(), {"it": folder}, router=ByTask()).eval()
    expected = outputs(mixture, batch, task="it")
    assert mixture.export_peft(tmp_path / "ours", task="it").exact
    torch.testing.assert_close(by_peft(tmp_path / "ours", make(), batch), expected, rtol=1e-5, atol=1e-5)
    again = compose(make(), {"it": tmp_path / "ours"}, router=ByTask()).eval()
    torch.testing.assert_close(outputs(again, batch, task="it"), expected, rtol=1e-5, atol=1e-5)


@over_options
def test_on_a_base_in_bfloat16_outputs_are_as_near_the_exact_ones_as_those_of_peft(name: str, tmp_path: Path) -> None:
    make, batch, folder = prepared(name, torch.bfloat16, tmp_path / "peft")
    rough = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in batch.items()}
    exact = by_peft(folder, make().bfloat16().float(), batch)
    theirs = by_peft(folder, make().bfloat16(), rough).float()
    mixture = compose(make().bfloat16(), {"it": folder}, router=ByTask()).eval()
    ours = outputs(mixture, rough, task="it").float()
    assert float((ours - exact).norm()) <= 1.5 * float((theirs - exact).norm())  # peft computes in float32 within


def test_a_folder_of_one_scale_keeps_the_bits_and_number_types_of_its_tensors(tmp_path: Path) -> None:
    make, _, folder = prepared("rslora", torch.bfloat16, tmp_path / "peft")
    mixture = compose(make(), {"it": folder}, router=ByTask())
    spec = mixture.spec.experts["it"]
    assert isinstance(spec, LoRA)
    assert (spec.rank, spec.alpha, spec.rank_stabilized, spec.bias) == (4, 5.0, True, False)
    assert {p.dtype for _, bank in mixture.banks() for p in bank.parameters()} == {torch.bfloat16}
