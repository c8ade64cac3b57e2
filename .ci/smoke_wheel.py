"""Use an installed moadapt as its user would: find parts, attach, train, save, load, merge, load what is shipped.

Run it with an interpreter that has nothing but the wheel, from a folder that is not the checkout: `python -I
smoke_wheel.py`. It prints one line a step and fails on the first thing that does not hold.
"""

import copy
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moadapt
from moadapt.adapters import LoRA
from moadapt.bases import load_base
from moadapt.registry import BASES, FAMILIES, MERGES, ROUTERS, TASKS
from moadapt_routers import ByTask, TopK

TASK_NAMES = ["vqa", "captioning"]
IDS = torch.arange(4, 24).reshape(2, 10)
LABELS = IDS.where(torch.arange(10) >= 4, -100)


def main() -> None:
    """Run all steps."""
    check_parts()
    with tempfile.TemporaryDirectory() as folder:
        check_training(Path(folder))
    check_merge()
    check_shipped_bases()
    print("the wheel is whole")


def tiny_base() -> LlamaForCausalLM:
    """Return the same small random Llama every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def attach(router: object, base: LlamaForCausalLM) -> torch.nn.Module:
    """Attach a shared adapter and two experts, the experts away from their neutral start."""
    torch.manual_seed(1)
    experts = {name: LoRA(rank=rank) for name, rank in zip(TASK_NAMES, (4, 3), strict=True)}
    return moadapt.attach(base, shared=LoRA(rank=2), experts=experts, router=router)


def train(mixture: torch.nn.Module, steps: int) -> list[float]:
    """Take some steps on one batch and return the losses."""
    optimizer = torch.optim.AdamW([p for p in mixture.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = mixture(input_ids=IDS, labels=LABELS, task=TASK_NAMES).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_parts() -> None:
    """The package comes from the wheel and its entry points lead to all parts."""
    place = Path(moadapt.__file__)
    assert place.is_relative_to(sys.prefix), f"moadapt was imported from {place}, not from {sys.prefix}"
    assert (place.parent / "py.typed").is_file(), "the wheel has lost py.typed"
    for group, registry, expected in [
        ("moadapt.routers", ROUTERS, {"by_task", "constant", "softmax", "top_k"}),
        ("moadapt.tasks", TASKS, {"captioning", "grounding", "vqa"}),
    ]:
        assert entry_points(group=group), f"the wheel declares no entry point in {group}"
        missing = expected - set(registry.names())
        assert not missing, f"no {registry.kind} called {', '.join(sorted(missing))}; there are {registry.names()}"
    for registry in (FAMILIES, ROUTERS, TASKS, MERGES):
        print(f"{registry.kind}: {', '.join(registry.names())}")


def check_training(folder: Path) -> None:
    """Two steps change the loss; what is saved computes the same after loading."""
    base = tiny_base()
    fresh = copy.deepcopy(base)
    mixture = attach(TopK(k=2), base)
    before, after = train(mixture, steps=2)
    assert after < before, f"two steps brought the loss from {before} to {after}"
    mixture.eval()
    mixture.save(folder / "mixture")
    loaded = moadapt.load(folder / "mixture", fresh).eval()
    with torch.no_grad():
        assert torch.equal(mixture(input_ids=IDS).logits, loaded(input_ids=IDS).logits), "loading changed the output"
    print(f"trained two steps ({before:.3f} -> {after:.3f}), saved and loaded bit for bit")


def check_merge() -> None:
    """A merge for one task is exact where the routing depends on the task only."""
    mixture = attach(ByTask(), tiny_base())
    train(mixture, steps=2)
    mixture.eval()
    plain, report = mixture.merge("task", task="vqa")
    with torch.no_grad():
        routed = mixture(input_ids=IDS, task=["vqa", "vqa"]).logits
        merged = plain(input_ids=IDS).logits
    torch.testing.assert_close(merged, routed, rtol=1e-4, atol=1e-5)
    assert report.exact, "routing by task merges exactly, but the report says otherwise"
    print(f"merged into a plain {type(plain).__name__}")


def check_shipped_bases() -> None:
    """Every base that the packages ship loads, with its processor."""
    for name, _ in BASES:
        model, processor = load_base(name)
        count = sum(p.numel() for p in model.parameters())
        print(f"shipped base {name}: {type(model).__name__}, {count:,} parameters, {type(processor).__name__}")


if __name__ == "__main__":
    main()
