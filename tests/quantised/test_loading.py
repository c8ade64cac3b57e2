"""Bases are quantised while they are loaded, by one name; what cannot be is refused with what to do."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt import quantising
from moadapt.adapters import LoRA
from moadapt.bases import load_base
from moadapt.quantised import is_quantised
from moadapt.training import MixedTasks, MixtureModule, Optimization
from tests.bases.twins import twin
from tests.quantised.bases import LINEARS, batch, quantised
from tests.training import toy
from tests.training.runs import trainer


@pytest.mark.parametrize("way", quantising.QUANTISATIONS)
def test_all_linears_but_the_output_layer_are_quantised(way: str, folder: str) -> None:
    base = quantised(folder, way)
    assert {path for path, m in base.named_modules() if is_quantised(m)} == {
        path for path, _ in base.named_modules() if path.endswith(LINEARS)
    }
    plain, _ = load_base(folder)
    with torch.no_grad():
        found, wanted = base(**batch()).logits, plain(**batch()).logits
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.5


def test_a_way_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    made = twin("gpt2")  # whose layers are no linear ones to torchao
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="int8 finds no linear layer to quantise"):
        quantised(str(tmp_path), "int8")


def test_a_base_that_was_written_quantised_is_loaded_as_it_is(folder: str, tmp_path: Path) -> None:
    base = quantised(folder, "int8")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    base.save_pretrained(tmp_path)
    again, _ = load_base(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, base(**batch()).logits)
    with pytest.raises(ValueError, match=r"^the base was written quantised, so it cannot"):
        load_base(str(tmp_path), quantize="int8")


def test_an_unknown_way_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"^quantize is 'int3'; choose one of int8, int4, nf4, llm_int8"):
        load_base(folder, quantize="int3")


@pytest.mark.parametrize(("way", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_library_is_named(way: str, library: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"^quantize: {way} needs {library}; run pip install 'moadapt\[quant\]'"):
        load_base(folder, quantize=way)


def test_widths_that_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed; pip install 'moadapt[quant]'")
    base = toy.write_base(tmp_path)  # 16 and 24 wide
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_base(base, quantize="int4")


@pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning")
def test_a_module_trains_on_a_quantised_base(tmp_path: Path) -> None:
    base = toy.write_base(tmp_path / "base")
    quantised(base, "int8")  # or skips
    module = MixtureModule(base, shared=LoRA(rank=2), optimization=Optimization(learning_rate=1e-2), quantize="int8")
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.mixture.named_adapter_parameters()}
    options: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0}
    data = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=3)
    trainer(tmp_path, **options).fit(module, datamodule=data)
    assert any(is_quantised(m) for m in module.transformer.modules())
    assert any(not torch.equal(p, before[n]) for n, p in module.mixture.named_adapter_parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["nf4", "llm_int8"])
def test_a_base_trains_and_merges_on_a_gpu(way: str, folder: str) -> None:
    from moadapt import attach

    mixture = attach(quantised(folder, way, "bfloat16").to("cuda"), shared=LoRA(rank=2)).train()
    on = {name: tensor.to("cuda") for name, tensor in batch().items()}
    mixture(**on).loss.backward()
    assert all(p.grad is not None for _, p in mixture.named_adapter_parameters())
    plain, report = mixture.eval().merge("task")
    assert report.exact is (way == "nf4")
    with torch.no_grad():
        wanted, found = mixture(**on).logits.float(), plain(**on).logits.float()
    assert (found - wanted).norm() / wanted.norm() < 0.05
