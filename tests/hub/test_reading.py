"""Folders of others: what is taken in which form, and what is refused for which reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moadapt import compose, load
from moadapt.adapters import NotMergeable
from moadapt.hub import examine
from moadapt_routers import ByTask
from tests.hub.trained import BASES, by_peft, disturb, outputs, quiet, saved
from tests.models import llava_batch, tiny_llama, tiny_llava

SELF = ["q_proj", "v_proj"]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT = BASES["llama"][1]()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "peft", tiny_llama(), r=4, target_modules=SELF)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    found = {key: tensor.clone() for key, tensor in load_file(folder / TENSORS).items()}
    save_file({key: tensor.contiguous() for key, tensor in change(found).items()}, folder / TENSORS)


def assert_as_peft(folder: Path, expected: Tensor) -> None:
    mixture = compose(tiny_llama(), {"it": folder}, router=ByTask()).eval()
    torch.testing.assert_close(outputs(mixture, TEXT, task="it"), expected, rtol=1e-5, atol=1e-5)


def test_a_folder_divided_into_files_is_read(folder: Path) -> None:
    expected = by_peft(folder, tiny_llama(), TEXT)
    tensors = load_file(folder / TENSORS)
    places = {key: f"adapter_model-{index % 2}.safetensors" for index, key in enumerate(tensors)}
    for part in set(places.values()):
        save_file({key: tensor for key, tensor in tensors.items() if places[key] == part}, folder / part)
    (folder / TENSORS).unlink()
    (folder / f"{TENSORS}.index.json").write_text(json.dumps({"weight_map": places}))
    assert_as_peft(folder, expected)


def test_a_pickled_file_is_read_without_running_anything(folder: Path) -> None:
    expected = by_peft(folder, tiny_llama(), TEXT)
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    assert_as_peft(folder, expected)


def test_a_folder_of_the_hubs_cache_whose_files_are_links_is_read(folder: Path, tmp_path: Path) -> None:
    expected = by_peft(folder, tiny_llama(), TEXT)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot.parent.parent / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, name in enumerate((CONFIG, TENSORS)):
        (folder / name).rename(snapshot.parent.parent / "blobs" / str(index))
        (snapshot / name).symlink_to(f"../../blobs/{index}")
    assert_as_peft(snapshot, expected)


def test_a_hub_name_is_fetched_without_its_other_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **how: Any) -> str:
        asked.update(name=name, **how)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert not examine("owner/name", tiny_llama())[0].refused
    assert asked == {
        "name": "owner/name",
        "allow_patterns": ["adapter_config.json", "*.safetensors", "*.bin", "*.index.json"],
    }


def test_every_key_has_a_fate(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "it", tiny_llama(), target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]
    )
    diagnosis, found = examine(folder, tiny_llama())
    assert {key.key for key in diagnosis.keys} == set(load_file(folder / TENSORS))
    assert diagnosis.counts == {"mapped": 2 + 6, "converted": 1, "checked": 1}
    assert found is not None
    assert found.owned == {"lm_head"}
    assert not diagnosis.refused
    assert json.loads(json.dumps(diagnosis.as_json()))["kind"] == "LORA"


def test_modules_that_are_targeted_but_have_no_tensors_are_noted_and_stay(folder: Path) -> None:
    change_tensors(folder, lambda found: {key: t for key, t in found.items() if "layers.1." not in key})
    with quiet():
        expected = by_peft(folder, tiny_llama(), TEXT)
    diagnosis, _ = examine(folder, tiny_llama())
    assert diagnosis.notes == (
        "2 modules that its configuration targets stay as they are, such as model.layers.1.self_attn.q_proj",
    )
    assert_as_peft(folder, expected)


def test_names_of_adapters_that_are_parts_of_paths_lose_nothing(folder: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", tiny_llama(), r=2, target_modules=["q_proj", "down_proj"])
    names = {"self_attn": folder, "mlp": other, "0": folder, "model": other}
    expected = {name: by_peft(source, tiny_llama(), TEXT) for name, source in names.items()}
    mixture = compose(tiny_llama(), names, router=ByTask()).eval()
    mixture.save(tmp_path / "mixture")
    loaded = load(tmp_path / "mixture", tiny_llama()).eval()
    for name in names:
        torch.testing.assert_close(outputs(mixture, TEXT, task=name), expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(outputs(loaded, TEXT, task=name), outputs(mixture, TEXT, task=name))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_two_adapters_that_changed_their_base_share_one_base(start: str, tmp_path: Path) -> None:
    folders = {
        name: saved(tmp_path / name, tiny_llama(), r=rank, init_lora_weights=start, target_modules=targets)
        for name, rank, targets in (("a", 4, SELF), ("b", 2, ["q_proj", "down_proj"]))
    }
    base = tiny_llama()
    before = outputs(base, TEXT)
    mixture = compose(base, folders, router=ByTask()).eval()
    for name, folder in folders.items():
        expected = by_peft(folder, tiny_llama(), TEXT)
        torch.testing.assert_close(outputs(mixture, TEXT, task=name), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(mixture.detach(), TEXT), before)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda"])
def test_a_start_that_cannot_be_computed_needs_the_adapter_before_training(start: str, tmp_path: Path) -> None:
    base = tiny_llama()
    with quiet():
        model: Any = peft.get_peft_model(base, peft.LoraConfig(r=3, init_lora_weights="pissa", target_modules=SELF))
        model.peft_config["default"].init_lora_weights = start
        model.save_pretrained(str(tmp_path / "before"))
        disturb(model)
        expected = outputs(model.eval(), TEXT)
        model.save_pretrained(str(tmp_path / "after"))
    with pytest.raises(ValueError, match=rf"changed before training \(init_lora_weights='{start}'\).* as initial"):
        compose(tiny_llama(), {"it": tmp_path / "after"}, router=ByTask())
    mixture = compose(
        tiny_llama(), {"it": tmp_path / "after"}, router=ByTask(), initial={"it": tmp_path / "before"}
    ).eval()
    torch.testing.assert_close(outputs(mixture, TEXT, task="it"), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="initial names them; the adapters are it"):
        compose(tiny_llama(), {"it": tmp_path / "after"}, router=ByTask(), initial={"them": tmp_path / "before"})


def test_a_file_that_peft_converted_to_its_initial_base_is_a_plain_one(tmp_path: Path) -> None:
    with quiet():
        model: Any = peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=SELF)
        )
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "before"))
        model.peft_config["default"].init_lora_weights = "pissa"
        disturb(model)
        expected = outputs(model.eval(), TEXT)
        model.save_pretrained(
            str(tmp_path / "after"), path_initial_model_for_weight_conversion=str(tmp_path / "before")
        )
    assert json.loads((tmp_path / "after" / CONFIG).read_text())["r"] == 6
    assert_as_peft(tmp_path / "after", expected)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 3, "use_rslora": True, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 2}},
    ],
    ids=["plain", "patterns"],
)
def test_a_dora_is_hosted_alone_and_beside_others(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    dora = saved(tmp_path / "dora", tiny_llama(), use_dora=True, target_modules=SELF, **options)
    expected = by_peft(dora, tiny_llama(), TEXT)
    mixture = compose(tiny_llama(), {"dora": dora, "lora": folder}, router=ByTask()).eval()
    torch.testing.assert_close(outputs(mixture, TEXT, task="dora"), expected, rtol=1e-5, atol=1e-5)
    plain, report = mixture.merge("task", task="dora")
    assert report.exact
    torch.testing.assert_close(outputs(plain, TEXT), expected, rtol=1e-5, atol=1e-5)
    other = by_peft(folder, tiny_llama(), TEXT)
    torch.testing.assert_close(outputs(mixture, TEXT, task="lora"), other, rtol=1e-5, atol=1e-5)
    with pytest.raises((NotMergeable, ValueError), match="dense part"):
        mixture.export_peft(tmp_path / "out", task="dora")


def test_adapters_train_unless_they_are_frozen(folder: Path) -> None:
    mixture = compose(tiny_llama(), {"it": folder}, router=ByTask())
    mixture(**TEXT, labels=TEXT["input_ids"], task="it").loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for _, p in mixture.named_adapter_parameters())
    mixture.detach()
    frozen = compose(tiny_llama(), {"it": folder}, router=ByTask(), frozen=True)
    assert frozen.frozen == ("it",)


def test_a_module_that_two_have_whole_is_refused(tmp_path: Path) -> None:
    folders = {
        name: saved(tmp_path / name, tiny_llama(), target_modules=SELF, modules_to_save=["lm_head"]) for name in "ab"
    }
    with pytest.raises(ValueError, match=r"a and b both have lm_head whole \(modules_to_save\), which can have one"):
        compose(tiny_llama(), folders, router=ByTask())


def test_an_export_is_refused_on_another_base(folder: Path, tmp_path: Path) -> None:
    mixture = compose(tiny_llama(), {"it": folder}, router=ByTask())
    mixture.export_peft(tmp_path / "ours", task="it")
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"made for the base .*has other weights; load that base"):
        compose(other, {"it": tmp_path / "ours"}, router=ByTask())
    assert not examine(tmp_path / "ours", other.to("meta"))[0].refused
    assert examine(tmp_path / "ours", tiny_llava().to("meta"))[0].refused


def _poisoned(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(found: dict[str, Tensor]) -> dict[str, Tensor]:
        next(iter(found.values()))[0, 0] = value
        return found

    return change


def _first(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda found: {key: change(t) if index == 0 else t for index, (key, t) in enumerate(found.items())}


def _with(key: str, shape: tuple[int, ...] = (4, 32)) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda found: {**found, key: torch.ones(shape)}


LAYER = "base_model.model.model.layers.0.self_attn"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "nan": (_poisoned(float("nan")), r"not finite \(NaN or infinite\)"),
    "infinite": (_poisoned(float("inf")), "not finite"),
    "none": (lambda found: {}, "holds no tensor"),
    "empty": (_first(lambda t: t[:0]), r"was saved in pieces \(ZeRO-3, FSDP\)"),
    "flat": (_first(lambda t: t.flatten()), "was saved in pieces"),
    "narrow": (_first(lambda t: t[:, :-1]), r"has shape \(4, 31\), where .* needs \(4, 32\)"),
    "rank": (_first(lambda t: t[:2]), "has rank 2, but its configuration says 4"),
    "half": (lambda found: {k: t for k, t in found.items() if k != f"{LAYER}.q_proj.lora_B.weight"}, "half is missing"),
    "integers": (_first(lambda t: t.to(torch.int8)), "holds I8; an adapter's tensors are floating-point numbers"),
    "module": (_with("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"), "has no module"),
    "unknown": (_with("base_model.model.model.rotary.inv_freq"), "is no tensor of a LoRA that is known"),
    "twice": (_with(f"{LAYER}.q_proj.lora_A.default.weight"), "is the same tensor of"),
    "not targeted": (_with(f"{LAYER}.k_proj.lora_A.weight"), "configuration does not target this module"),
    "norm": (_with("base_model.model.model.norm.lora_A.weight"), "no adapter can sit at model.norm, a LlamaRMSNorm"),
    "trained base": (_with("base_model.model.lm_head.weight", (67, 32)), "does not say that it was trained"),
    "other vocabulary": (_with("base_model.model.model.embed_tokens.weight", (70, 32)), r"has shape \(70, 32\)"),
    "adalora": (_with(f"{LAYER}.q_proj.lora_E"), "belongs to AdaLoRA"),
    "lycoris": (_with("lora_te_model_layers_0_self_attn_q_proj.hada_w1_a"), "LyCORIS"),
    "rows of embedding": (_with("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"), "rows"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused_with_the_reason(name: str, folder: Path) -> None:
    change, message = BAD_TENSORS[name]
    change_tensors(folder, change)
    base = tiny_llama()
    with pytest.raises(ValueError, match=message):
        compose(base, {"it": folder}, router=ByTask())
    assert not any("moadapt" in type(module).__module__ for module in base.modules())


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": ({"r": 3}, "has rank 4, but its configuration says 3"),
    "no rank": ({"r": None}, "r=None; it must be a whole number above 0"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha=nan; it must be a finite number"),
    "dropout": ({"lora_dropout": 2}, "must be a share between 0 and 1"),
    "targets": ({"target_modules": {"q": 1}}, "target_modules=.*must be a list of names"),
    "pattern": ({"target_modules": "(.*"}, "is no regular expression"),
    "slow pattern": ({"target_modules": r"(?:(?:\w|\w)|\.|\w)*(?=\d\d).*"}, "takes too long to match"),
    "ranks": ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1"),
    "bias": ({"bias": "some"}, "bias=some; it must be one of none, all, lora_only"),
    "lora_bias": ({"lora_bias": True}, "configuration has lora_bias, but there is none"),
    "dora": ({"use_dora": True}, "a DoRA has A, B, magnitude there, but the file A, B"),
    "no kind": ({"peft_type": None}, "peft has no tuner 'NONE'"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "trains what stands before the prompt"),
    "vera": ({"peft_type": "VERA"}, "files of peft's VERA are not read yet"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "replication": ({"layer_replication": [[0, 2]]}, "its base has layers twice"),
    "tied": ({"ensure_weight_tying": True}, "changes tied weights together"),
    "experts": ({"target_parameters": ["experts.down_proj"]}, "stacked parameters"),
    "rows": ({"trainable_token_indices": [1]}, "single rows of the token embedding"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configurations_are_refused_with_the_reason(name: str, folder: Path) -> None:
    values, message = BAD_CONFIGS[name]
    change_config(folder, **values)
    with pytest.raises(ValueError, match=message):
        compose(tiny_llama(), {"it": folder}, router=ByTask())


def test_a_trained_bias_of_a_norm_is_refused(tmp_path: Path) -> None:
    make = BASES["gpt2"][0]
    folder = saved(tmp_path / "it", make(), target_modules=["c_attn"], bias="all")
    with pytest.raises(ValueError, match="the bias of a LayerNorm was trained; those of linear layers are taken"):
        compose(make(), {"it": folder}, router=ByTask())


def test_unknown_settings_and_another_name_of_the_base_are_noted(folder: Path) -> None:
    change_config(folder, brand_new=1, base_model_name_or_path="a/b")
    base = tiny_llama()
    base.config.name_or_path = "c/d"
    notes = examine(folder, base)[0].notes
    assert notes == (
        "its configuration has unknown settings, which are ignored: brand_new",
        "it says that it was trained on a/b; the base given is c/d",
    )


def test_a_reason_is_given_for_every_refusal_and_the_first_are_in_the_error(folder: Path) -> None:
    change_tensors(folder, lambda found: {key: t[:, :-1] if "lora_A" in key else t for key, t in found.items()})
    diagnosis, found = examine(folder, tiny_llama())
    assert found is None
    assert diagnosis.counts == {"refused": 12}
    with pytest.raises(ValueError, match=r"is refused: .*; and 9 more, see `moadapt doctor`"):
        diagnosis.check()


def test_an_adapter_of_the_language_tower_alone_leaves_the_vision_tower(tmp_path: Path) -> None:
    batch = llava_batch()
    folder = saved(tmp_path / "it", tiny_llava(), target_modules=SELF, exclude_modules=r".*vision_tower.*")
    mixture = compose(tiny_llava(), {"it": folder}, router=ByTask()).eval()
    assert {site.tower for site in mixture.sites} == {"language"}
    torch.testing.assert_close(
        outputs(mixture, batch, task="it"), by_peft(folder, tiny_llava(), batch), rtol=1e-5, atol=1e-5
    )


def test_neither_a_folder_nor_a_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for given, message in (
        (tmp_path / "empty", "lacks adapter_config.json, adapter_model.safetensors"),
        (tmp_path / "notes.txt", r"neither a folder nor \.safetensors"),
        ("no such", "there is no folder no such; give one, or a hub name such as owner/name"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(tiny_llama(), {"it": given}, router=ByTask())
    shutil.rmtree(tmp_path / "empty")
