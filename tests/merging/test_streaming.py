"""Merges from files to files: the same weights as in memory, in bounded memory, and never a half file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

import moadapt
from moadapt.adapters import Bias, FamilySpec, LoRA, NormTuning, Scale
from moadapt.merging import MergeRefusedError, checkpoint, streaming
from moadapt.merging.streaming import merge_stored
from moadapt.placement import Placement
from moadapt_routers import ByTask, Constant, Softmax
from tests.merging.planted import TASKS
from tests.models import randomize, tiny_llava

EVERYWHERE = Placement(towers=("vision", "connector", "language"))
SIZE = "40KB"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llava().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base" / "note.txt").write_text("kept")
    return tmp_path / "base"


def read(folder: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder)
    return found.eval()


def saved(base: Path, *, router: Any = None, experts: dict[str, FamilySpec] | None = None) -> Path:
    given = experts or {name: LoRA(rank=2 + i, alpha=3) for i, name in enumerate(TASKS)}
    router = router or ByTask()
    mixture = moadapt.attach(read(base), shared=LoRA(rank=2), experts=given, router=router, placement=EVERYWHERE)
    randomize(mixture, 0.1)
    mixture.save(base.parent / "mixture")
    return base.parent / "mixture"


METHODS: dict[str, dict[str, Any]] = {
    "task": {"task": "captioning"},
    "uniform": {"tasks": ["vqa", "grounding"]},
    "cat": {"weights": {"vqa": 0.3, "grounding": -1.0}},
    "task_arithmetic": {"scale": 0.5, "rank": 3},
    "ties": {"density": 0.3},
    "dare": {"seed": 5},
    "magnitude": {"rank": 2},
    "knots": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_it_gives_the_weights_of_the_merge_in_memory(method: str, base: Path) -> None:
    folder, out, told = saved(base), base.parent / "out", []
    options = METHODS[method]
    report = merge_stored(folder, base, out, method, shard_size=SIZE, progress=lambda *a: told.append(a), **options)
    expected, other = moadapt.load(folder, read(base)).merge(method, **options)
    found = read(out)
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    assert report.sites == pytest.approx(other.sites)
    assert (report.exact, report.tasks, report.why) == (other.exact, other.tasks, other.why)
    assert report.curve == pytest.approx(other.curve, abs=1e-5)
    assert (out / "note.txt").read_text() == "kept"
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1]
    assert all(file.stat().st_size < 45_000 for file in out.glob("*.safetensors"))
    assert sorted(p.name for p in base.parent.iterdir()) == ["base", "mixture", "out"]


FAMILIES: dict[str, dict[str, FamilySpec]] = {
    "bias": {"a": Bias(placement=Placement(towers=("vision",))), "b": LoRA(rank=1)},
    "scale": {"a": Scale(), "b": LoRA(rank=3)},
    "norm_tuning": {"a": NormTuning(), "b": LoRA(rank=1)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_merged_as_in_memory(name: str, base: Path) -> None:
    folder = saved(base, router=Constant(weights=(0.7, -0.2)), experts=FAMILIES[name])
    report = merge_stored(folder, base, base.parent / "out", "mean_routing", shard_size=SIZE)
    expected, _ = moadapt.load(folder, read(base)).merge("mean_routing")
    found = read(base.parent / "out")
    assert report.exact
    for key, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(key), parameter), key


def test_a_bias_where_the_base_has_none_is_refused(base: Path) -> None:
    folder = saved(base, experts={name: Bias() for name in TASKS})
    with pytest.raises(ValueError, match=r"language_model\S+ has no bias, and would get one; merge in memory"):
        merge_stored(folder, base, base.parent / "out", "uniform")


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_merge_leaves_no_half_file_and_goes_on(
    stop: int, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, written = saved(base), base.parent / "out", []
    whole = streaming.save_file

    def save(tensors: Any, file: Path, **options: Any) -> None:
        if len(written) == stop:
            file.write_bytes(b"half")
            written.append("stopped")
            raise KeyboardInterrupt
        written.append(file.name)
        whole(tensors, file, **options)

    monkeypatch.setattr(streaming, "save_file", save)
    with pytest.raises(KeyboardInterrupt):
        merge_stored(folder, base, out, "ties", shard_size=SIZE)
    assert not out.exists()
    unfinished = base.parent / "out.unfinished"
    files = sorted(file.name for file in unfinished.iterdir())
    assert len(files) == stop + 1
    assert not any(name.startswith(".") for name in files)
    for name in files[1:]:
        load_file(unfinished / name)
    merge_stored(folder, base, out, "ties", shard_size=SIZE)
    count = len(list(out.glob("*.safetensors")))
    assert len(written) == count + 1, "no file was written twice"
    expected, _ = moadapt.load(folder, read(base)).merge("ties")
    found = read(out)
    assert all(torch.equal(found.get_parameter(name), p) for name, p in expected.named_parameters())
    assert not unfinished.exists()


def test_another_merge_begins_anew(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = saved(base), base.parent / "out"
    with monkeypatch.context() as patch:
        patch.setattr(streaming._Stream, "_finish", lambda self: None)
        merge_stored(folder, base, out, "ties", shard_size=SIZE)
    merge_stored(folder, base, out, "uniform", shard_size=SIZE)
    expected, _ = moadapt.load(folder, read(base)).merge("uniform")
    found = read(out)
    assert all(torch.equal(found.get_parameter(name), p) for name, p in expected.named_parameters())


def test_a_number_type_is_that_of_the_files_and_of_the_config(base: Path) -> None:
    folder, out = saved(base), base.parent / "out"
    merge_stored(folder, base, out, "task", task="vqa", dtype=torch.bfloat16)
    expected, _ = moadapt.load(folder, read(base)).merge("task", task="vqa", dtype=torch.bfloat16)
    found = read(out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, parameter in expected.named_parameters():
        assert found.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(found.get_parameter(name), parameter), name


def test_one_tensor_at_a_time_is_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = saved(base), []
    whole = checkpoint.Stored.read
    monkeypatch.setattr(checkpoint.Stored, "read", lambda self: seen.append(self.key) or whole(self))
    merge_stored(folder, base, base.parent / "out", "task", task="vqa", shard_size=SIZE)
    keys = {key for file in base.glob("*.safetensors") for key in load_file(file)}
    assert set(seen) == keys
    assert max(seen.count(key) for key in keys) == 2  # for its site, and for itself


def test_past_the_bound_nothing_is_left(base: Path) -> None:
    folder = saved(base)
    with pytest.raises(MergeRefusedError, match=r"relative errors pass 0\.01"):
        merge_stored(folder, base, base.parent / "out", "task", task="vqa", rank=1, max_error=0.01)
    assert sorted(p.name for p in base.parent.iterdir()) == ["base", "mixture"]


def test_another_base_is_refused_and_nothing_is_left(base: Path) -> None:
    folder, other = saved(base), tiny_llava()
    torch.nn.init.zeros_(other.lm_head.weight)
    other.save_pretrained(base.parent / "other")
    with pytest.raises(ValueError, match="has other weights; load the base it was trained on"):
        merge_stored(folder, base.parent / "other", base.parent / "out", "task", task="vqa")
    assert sorted(p.name for p in base.parent.iterdir()) == ["base", "mixture", "other"]


def test_what_cannot_be_streamed_says_why(base: Path) -> None:
    folder, out = saved(base, router=Softmax()), base.parent / "out"
    for method in ("regression", "mean_routing", "lorahub"):
        with pytest.raises(ValueError, match=f"merge '{method}' looks at rows, for which the whole base must run"):
            merge_stored(folder, base, out, method)
    with pytest.raises(ValueError, match="shows on rows alone; leave max_error out"):
        merge_stored(folder, base, out, "uniform", max_error=0.1)
    with pytest.raises(ValueError, match="a size is 'big'; write a number and KB, MB or GB"):
        merge_stored(folder, base, out, "uniform", shard_size="big")
    for file in base.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors\.index\.json nor"):
        merge_stored(folder, base, out, "uniform")
    out.mkdir()
    with pytest.raises(ValueError, match="exists already; give the path of a folder to be made"):
        merge_stored(folder, base, out, "uniform")
