"""Law 7: nothing is lost on disk, and what cannot be read is refused with the file's name and leaves the base alone."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from moadapt import Mixture, Placement, RouterSpec, attach, fresh_folder, load, storage
from moadapt.adapters import FamilySpec, LoRA
from moadapt.registry import FAMILIES
from moadapt_routers import ByTask, Constant, Softmax
from tests.conformance.canonical import EVERYWHERE, EXPERTS, FAMILY_PARAMS, TASKS, make, router_cases
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava

SPEC, TENSORS = "mixture.json", "adapters.safetensors"
LONGEST = "a" * 64
SAFE = ["q_proj", "model", "layers", "down", "lora_A", "adapters", "routers", "0", "123", "-".join("abc"), "_", LONGEST]
UNSAFE = [
    "", ".", "..", "a.b", "../a", "a/b", "a\\b", "a b", " a", "a\n", "a\0", "-a", LONGEST + "a", "\u00e9", "\u4efb",
    "shared", 1,
]  # fmt: skip


def logits(mixture: Mixture, task: Any = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = mixture(**llava_batch(), task=TASKS if task is None else task).logits
    return found


def assert_same_on_disk(mixture: Mixture, folder: Path, base: Any = None) -> Mixture:
    """Save and load, and compare spec, bits and, with the same tasks, logits."""
    mixture.save(folder)
    loaded = load(folder, tiny_llava() if base is None else base).eval()
    assert loaded.spec == mixture.spec
    assert list(loaded.spec.experts) == list(mixture.spec.experts)
    ours, theirs = (dict(each.named_adapter_parameters()) for each in (mixture, loaded))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name
    tasks = [mixture.tasks[row % len(mixture.tasks)] for row in range(3)] if mixture.tasks else None
    assert torch.equal(logits(mixture, tasks), logits(loaded, tasks))
    return loaded


@pytest.mark.parametrize("router", [None, ByTask()], ids=["shared", "experts"])
@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_a_family_comes_back_bit_for_bit(family: type[FamilySpec], router: RouterSpec | None, tmp_path: Path) -> None:
    assert_same_on_disk(make(router, EVERYWHERE, family=family), tmp_path / "saved")


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_frozen_adapters_of_a_family_come_back_frozen(family: type[FamilySpec], tmp_path: Path) -> None:
    mixture = make(ByTask(), EVERYWHERE, family=family)
    frozen = ("shared", EXPERTS[1])
    for name in frozen:
        mixture.freeze(name)
    loaded = assert_same_on_disk(mixture, tmp_path / "saved")
    assert loaded.frozen == frozen
    ours, theirs = (dict(each.named_adapter_parameters()) for each in (mixture, loaded))
    assert {n: p.requires_grad for n, p in theirs.items()} == {n: p.requires_grad for n, p in ours.items()}


def test_a_folder_that_tells_of_nothing_frozen_is_read(tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    rewrite(tmp_path / "saved", lambda stored: {key: each for key, each in stored.items() if key != "frozen"})
    assert load(tmp_path / "saved", tiny_llava()).frozen == ()


@pytest.mark.parametrize("frozen", [["nobody"], 3])
def test_frozen_adapters_that_are_none_are_refused(frozen: Any, tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    rewrite(tmp_path / "saved", lambda stored: stored.update(frozen=frozen))
    assert_refused(tmp_path / "saved", rf"saved/{SPEC}")


@pytest.mark.parametrize(("router", "placement"), router_cases())
def test_a_router_comes_back_bit_for_bit(router: RouterSpec, placement: Placement, tmp_path: Path) -> None:
    assert_same_on_disk(make(router, placement, shared=False), tmp_path / "saved")


def test_every_field_of_specs_comes_back(tmp_path: Path) -> None:
    upper = Placement(towers=("vision", "language"), kinds=("mlp",), depth=(1 / 3, 1.0))
    mixture = attach(
        tiny_llava(),
        shared=LoRA(rank=3, alpha=0.1, rank_stabilized=True, dropout=0.2),
        experts={"b": LoRA(rank=5, placement=upper, dropout=0.2), "a": LoRA(rank=2, alpha=1e-30, dropout=0.2)},
        router=Constant(weights=(0.1, -2 / 3)),
        placement=Placement(
            depth={"vision": (0.0, 0.5), "language": (1 / 3, 1.0)}, every=2, modules=("q_proj", "k_proj"), unread=True
        ),
    )
    randomize(mixture)
    assert_same_on_disk(mixture.eval(), tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_adapters_keep_their_number_type(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_same_on_disk(make(Softmax(), EVERYWHERE).to(dtype), tmp_path / "saved", tiny_llava().to(dtype))


def test_values_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    mixture = make(None)
    odd = torch.tensor([torch.inf, -torch.inf, -0.0, 1e-45])
    for _, parameter in mixture.named_adapter_parameters():
        with torch.no_grad():
            parameter.view(-1)[:4] = odd
    mixture.save(tmp_path / "saved")
    for _, parameter in load(tmp_path / "saved", tiny_llava()).named_adapter_parameters():
        assert torch.equal(parameter.view(-1)[:4].view(torch.int32), odd.view(torch.int32))


def test_any_accepted_name_comes_back(tmp_path: Path) -> None:
    names = [*SAFE, "a", "a-", "a-b", "A"]  # one is the start of the other
    mixture = attach(tiny_llava(), experts={name: LoRA(rank=1) for name in names}, router=ByTask())
    randomize(mixture)
    loaded = assert_same_on_disk(mixture.eval(), tmp_path / "saved")
    assert loaded.tasks == tuple(names)
    for name in names:
        assert torch.equal(logits(mixture, name), logits(loaded, name))


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
def test_an_unsafe_name_is_refused_at_creation(name: Any) -> None:
    base = tiny_llava()
    with pytest.raises(ValueError, match=r"adapter name .* (is refused; use 1 to 64 letters|belongs to the shared)"):
        attach(base, experts={"fine": LoRA(), name: LoRA()}, router=ByTask())
    attach(base, shared=LoRA())


def test_saving_changes_nothing_and_twice_writes_the_same(tmp_path: Path) -> None:
    mixture = make(Softmax(), EVERYWHERE)
    expected = logits(mixture)
    for name in ("first", "second"):
        mixture.save(tmp_path / name)
    assert torch.equal(logits(mixture), expected)
    for file in (SPEC, TENSORS):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_spec_from_a_file_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "a_family_in_a_file.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom moadapt.adapters import FamilySpec, LoRA\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own(FamilySpec):\n    width: int = 3\n"
        "    @classmethod\n    def bank(cls, site, adapters, module):\n"
        "        from dataclasses import replace\n"
        "        return LoRA.bank(site, [replace(a, spec=LoRA(rank=a.spec.width)) for a in adapters], module)\n"
    )
    mixture = attach(
        tiny_llava(),
        experts={"a": FAMILIES.get(f"{file}:Own")(width=5), "b": FAMILIES.get(f"{file}:Own")()},
        router=Softmax(),
    )
    randomize(mixture)
    loaded = assert_same_on_disk(mixture.eval(), tmp_path / "saved")
    assert [bank.names for _, bank in loaded.banks()] == [("a", "b")] * len(loaded.sites)


def test_the_base_may_be_loaded_in_another_number_type(tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", tiny_llava().bfloat16())
    assert {p.dtype for _, p in loaded.named_adapter_parameters()} == {torch.float32}


def other_weights() -> Any:
    base = tiny_llava()
    nn.init.zeros_(base.lm_head.weight)
    return base


def other_size() -> Any:
    base = tiny_llava()
    base.resize_token_embeddings(70, mean_resizing=False)
    return base


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (tiny_llama, r"\(LlavaForConditionalGeneration\); the base given, a LlamaForCausalLM, has another class"),
        (other_size, "has other parameters; load the base it was trained on"),
        (other_weights, "has other weights; load the base it was trained on"),
    ],
)
def test_another_base_is_refused(base: Callable[[], Any], message: str, tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    assert_refused(tmp_path / "saved", rf"saved was trained on .*{message}", base())


def test_a_base_that_carries_a_mixture_is_refused(tmp_path: Path) -> None:
    mixture = make(ByTask())
    mixture.save(tmp_path / "saved")
    expected = logits(mixture)
    with pytest.raises(ValueError, match="carries a mixture already"):
        load(tmp_path / "saved", mixture.base)
    assert torch.equal(logits(mixture), expected)


def assert_refused(folder: Path, message: str, base: Any = None) -> None:
    """Loading names what is wrong and leaves the base as it was."""
    base = tiny_llava() if base is None else base
    base.train()
    base.requires_grad_(False)
    next(base.parameters()).requires_grad_()

    def state() -> list[Any]:
        modules = [(path, id(module), module.training) for path, module in base.named_modules()]
        parameters = [(name, id(p), p.requires_grad, p.detach().clone().sum()) for name, p in base.named_parameters()]
        return [*modules, *parameters, len(base._forward_hooks), len(base._forward_pre_hooks)]

    before = state()
    with pytest.raises(ValueError, match=message):
        load(folder, base)
    assert state() == before
    attach(base, shared=LoRA()).detach()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a saved spec; what `change` returns takes its place, if anything."""
    stored = json.loads((folder / SPEC).read_text())
    changed = change(stored)
    (folder / SPEC).write_text(json.dumps(stored if changed is None else changed))


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.update(schema=storage.SCHEMA + 1),
        lambda stored: stored.update(schema=None),
        lambda stored: stored.pop("schema"),
        lambda stored: stored.pop("router"),
        lambda stored: [stored],
        lambda stored: "mixture",
    ],
)
def test_another_schema_is_refused(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    rewrite(tmp_path / "saved", change)
    assert_refused(tmp_path / "saved", rf"saved/{SPEC} has schema .*this version reads schema {storage.SCHEMA} with")


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.update(base="llava"),
        lambda stored: stored.update(experts=3),
        lambda stored: stored.update(experts=["ask", "tell", "find"]),
        lambda stored: stored["experts"][0].pop("adapter"),
        lambda stored: stored["experts"][0].update(adapter="../ask"),
        lambda stored: stored["experts"][0].pop("name"),
        lambda stored: stored["experts"][0].update(name="nothing"),
        lambda stored: stored["experts"][0].update(name="pathlib.Path"),
        lambda stored: stored["experts"][0].update(unknown=1),
        lambda stored: stored["experts"][0].update(placement={"depth": [0.9, 0.1]}),
        lambda stored: stored.update(shared={"name": "lora", "rank": "eight"}),
        lambda stored: stored.update(shared={"name": "lora", "rank": 0}),
        lambda stored: stored.update(router={"name": "top_k", "k": 4}),
        lambda stored: stored.update(router=None),
        lambda stored: stored.update(experts=[], shared=None),
        lambda stored: stored.update(placement=None),
        lambda stored: stored.update(placement={"modules": ["no_such_module"]}),
    ],
)
def test_a_garbled_spec_is_refused(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    rewrite(tmp_path / "saved", change)
    assert_refused(tmp_path / "saved", rf"saved/{SPEC} ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not json"], ids=repr)
def test_a_spec_that_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    (tmp_path / "saved" / SPEC).write_bytes(content)
    assert_refused(tmp_path / "saved", rf"saved holds no readable {SPEC}")


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_folder_without_a_mixture_is_refused(folder: str, tmp_path: Path) -> None:
    assert_refused(tmp_path / folder, rf"holds no readable {SPEC}.*give a folder that save\(\) wrote")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_tensors_are_refused(kept: int, tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    file = tmp_path / "saved" / TENSORS
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(tmp_path / "saved", rf"saved/{TENSORS} cannot be read")


def test_a_missing_file_of_tensors_is_refused(tmp_path: Path) -> None:
    make(ByTask()).save(tmp_path / "saved")
    (tmp_path / "saved" / TENSORS).unlink()
    assert_refused(tmp_path / "saved", rf"saved/{TENSORS} cannot be read")


@pytest.mark.parametrize("start", ["adapters/ask/", "adapters/shared/", "routers/"])
@pytest.mark.parametrize("fault", ["missing", "unknown", "another shape"])
def test_tensors_that_do_not_fit_are_refused(fault: str, start: str, tmp_path: Path) -> None:
    make(Softmax()).save(tmp_path / "saved")
    file = tmp_path / "saved" / TENSORS
    found = safetensors.torch.load_file(file)
    name = next(name for name in found if name.startswith(start))
    tensor = found.pop(name)
    if fault != "missing":
        found[name if fault == "another shape" else name + "x"] = tensor[..., 1:].clone()
    if fault == "unknown":
        found[name] = tensor
    safetensors.torch.save_file(found, file)
    assert_refused(tmp_path / "saved", rf"saved/{TENSORS}: 1 tensors are missing, unknown or of another shape.*{start}")


@pytest.mark.parametrize("present", [[], [SPEC], [SPEC, TENSORS]], ids=str)
def test_saving_over_a_mixture_or_an_empty_folder_replaces_it_whole(present: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    make(Softmax()).save(folder)
    for name in {SPEC, TENSORS} - set(present):
        (folder / name).unlink()
    assert_same_on_disk(make(ByTask()), folder)
    assert sorted(os.listdir(folder)) == [TENSORS, SPEC]
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize("stray", ["run_1", ".git"])
@pytest.mark.parametrize("write", [Mixture.save, lambda mixture, folder: mixture.export_peft(folder, task="ask")])
def test_a_folder_that_holds_something_else_is_not_replaced(write: Any, stray: str, tmp_path: Path) -> None:
    folder, mixture = tmp_path / "runs", make(ByTask())
    write(mixture, folder)
    (folder / stray).mkdir()
    (folder / stray / "weights").write_text("of weeks")
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match=rf"runs holds '{stray}' and would be replaced as a whole; give the path of a"):
        write(mixture, folder)
    assert sorted(os.listdir(folder)) == before
    assert (folder / stray / "weights").read_text() == "of weeks"
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.parametrize("name", [".", "../here"])
def test_the_working_folder_is_not_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="here is the working folder, which cannot be replaced; give the path of ano"):
        make(ByTask()).save(name)
    assert os.listdir(tmp_path) == ["here"]


def test_saving_through_a_link_replaces_what_it_names(tmp_path: Path) -> None:
    make(Softmax()).save(tmp_path / "saved")
    (tmp_path / "last").symlink_to(tmp_path / "saved")
    assert_same_on_disk(make(ByTask()), tmp_path / "last")
    assert (tmp_path / "last").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["last", "saved"]


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(ValueError, match="notes is a file; give the path of a folder"):
        make(ByTask()).save(tmp_path / "notes")
    assert os.listdir(tmp_path) == ["notes"]
    assert (tmp_path / "notes").read_text() == "kept"


def test_saving_makes_the_folders_above(tmp_path: Path) -> None:
    assert_same_on_disk(make(ByTask()), tmp_path / "a" / "b" / "saved")


def assert_keeps_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    """Save a mixture over another, which must fail, and find the old one in its place, and nothing else."""
    folder = tmp_path / "saved"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    mixture = make(Softmax())
    expected = logits(mixture)
    with pytest.raises(error):
        mixture.save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["saved"]
    assert torch.equal(logits(mixture), expected)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["tensors", "spec", "first rename", "last rename"])
def test_a_failure_while_saving_keeps_the_old_folder(
    step: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(ByTask()).save(tmp_path / "saved")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    places: dict[str, tuple[Any, str]] = {
        "tensors": (storage, "save_file"),
        "spec": (Path, "write_text"),
        "first rename": (Path, "rename"),
        "last rename": (fresh_folder, "put"),
    }
    monkeypatch.setattr(*places[step], fail)
    assert_keeps_the_old_one(tmp_path, error)


def test_a_spec_that_json_cannot_hold_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(ByTask()).save(tmp_path / "saved")
    to_json = storage.to_json
    monkeypatch.setattr(storage, "to_json", lambda *args: {**to_json(*args), "value": torch.zeros(1)})
    assert_keeps_the_old_one(tmp_path, TypeError)


def test_a_failure_of_the_first_save_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        make(ByTask()).save(tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_a_mixture_is_saved_as_it_was_attached_whatever_is_switched(tmp_path: Path) -> None:
    mixture = make(Softmax())
    expected = logits(mixture)
    with mixture.disabled(), mixture.override({"ask": 1.0}), mixture.only(["tell"]):
        mixture.save(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", tiny_llava()).eval()), expected)


def test_a_loaded_mixture_is_trained_on(tmp_path: Path) -> None:
    make(Softmax()).save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", tiny_llava())
    loaded.train()
    loaded(**llava_batch(), task=TASKS).loss.backward()
    assert all(p.grad is not None for _, p in loaded.named_adapter_parameters())
    assert all(p.grad is None for p in loaded.detach().parameters())


def test_a_fingerprint_reads_the_last_value_of_a_large_parameter() -> None:
    """Above 2**24 float32 holds no odd number, so indices must not be reckoned in it."""
    base = tiny_llama()
    base.lm_head.weight = nn.Parameter(torch.zeros(2**24 + 4, 1, dtype=torch.bfloat16))
    before = storage.fingerprint(base)
    with torch.no_grad():
        base.lm_head.weight[-1] = 1
    after = storage.fingerprint(base)
    assert after["structure"] == before["structure"]
    assert after["values"] != before["values"]


def test_a_fingerprint_takes_parameters_of_any_size() -> None:
    base, found = tiny_llama(), set()
    for size in (0, 1, 2, 15, 16, 17):
        base.lm_head.weight = nn.Parameter(torch.zeros(size))
        found.add(storage.fingerprint(base)["values"])
    assert len(found) == 5  # of 17 values 16 are read


@pytest.mark.parametrize("part", ["shared", "router", "expert"])
def test_a_stored_name_runs_no_code(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "was_run"
    (tmp_path / "evil_part.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    make(ByTask()).save(tmp_path / "saved")
    for name in (f"{tmp_path / 'evil_part.py'}:Evil", "evil_part.Evil"):

        def change(stored: dict[str, Any], name: str = name) -> None:
            (stored["experts"][0] if part == "expert" else stored[part])["name"] = name

        rewrite(tmp_path / "saved", change)
        assert_refused(tmp_path / "saved", rf"saved/{SPEC} .*{name}.* has not imported it.*import its module first")
    assert not mark.exists()
