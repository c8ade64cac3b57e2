"""What a step is said to hold against what a real one holds, by the profiler of torch's allocator."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import moadapt
from moadapt import Mixture, Placement
from moadapt.adapters import FamilySpec, LoRA
from moadapt.live_bytes import LiveBytes, bytes_of
from moadapt.router import RouterSpec
from moadapt.skeleton import skeleton
from moadapt.training.memory import training_memory
from moadapt_routers import ByTask, Softmax, Switch, TopK
from tests.conformance.canonical import FAMILY_PARAMS

ROWS, TOKENS, PICTURE, IMAGE = 4, 64, 32, 3
_TEXT = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": PICTURE,
    "patch_size": 4,
}  # fmt: skip
_T5 = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 4}
_LLAVA = {
    "vision_config": AutoConfig.for_model("clip_vision_model", **_VISION),
    "text_config": AutoConfig.for_model("llama", **_TEXT),
    "image_token_id": IMAGE,
    "image_seq_length": (PICTURE // 4) ** 2,
}
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, _TEXT),
    "llava": (LlavaForConditionalGeneration, _LLAVA),
    "t5": (T5ForConditionalGeneration, {**_T5, "decoder_start_token_id": 0}),
    "bert": (BertForSequenceClassification, {**_TEXT, "num_labels": 3}),
    "vit": (ViTForImageClassification, {**_VISION, "num_labels": 3}),
}
QUICK = (("llama", True), ("llava", False))
EVERYWHERE = Placement(towers=("vision", "language"))
ROUTERS: dict[str, RouterSpec] = {
    "top_1": TopK(k=1), "token": Softmax(scope="token"), "task": ByTask(), "switch": Switch(scope="token"),
}  # fmt: skip


def base_of(name: str) -> PreTrainedModel:
    cls, settings = BASES[name]
    kind = {"llava": "llava", "llama": "llama", "t5": "t5", "bert": "bert", "vit": "vit"}[name]
    model: PreTrainedModel = cls(AutoConfig.for_model(kind, **settings)).eval()
    return model


def batch_of(name: str, rows: int = ROWS, tokens: int = TOKENS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 3, PICTURE, PICTURE, generator=generator)
    if name == "vit":
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
    ids = torch.randint(5, 300, (rows, tokens), generator=generator)
    if name == "bert":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows, dtype=torch.long)}
    if name == "t5":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, : tokens // 2].clone()}
    given = {}
    if name == "llava":
        patches = int(_LLAVA["image_seq_length"])  # type: ignore[call-overload]
        ids = torch.cat([torch.full((rows, patches), IMAGE), ids], dim=1)
        given = {"pixel_values": pixels}
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - tokens // 2, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **given}


def mixture_of(
    name: str,
    router: RouterSpec,
    checkpointing: bool = False,
    family: type[FamilySpec] = LoRA,
    placement: Placement = EVERYWHERE,
) -> Mixture:
    torch.manual_seed(0)
    base = base_of(name)
    towers = {tower.name for tower in moadapt.sites.anatomy(base).towers}
    where = Placement(towers=tuple(t for t in placement.towers or () if t in towers))
    mixture = moadapt.attach(base, experts={"a": family(), "b": family()}, router=router, placement=where)
    if checkpointing:
        mixture.gradient_checkpointing_enable()
    return mixture.train()


def loss_of(batch: dict[str, Tensor], mixture: Mixture) -> Tensor:
    loss: Tensor = mixture(**batch, task=["a", "b"] * (ROWS // 2)).loss
    return loss


def measured(mixture: Mixture, run: Callable[[Mixture], Tensor]) -> tuple[int, int]:
    """Return the bytes that a step keeps for backward, and the most that it holds, beyond the weights."""
    run(mixture).backward()  # type: ignore[no-untyped-call]  # what is made once is there from now on
    mixture.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = run(mixture)
        with record_function("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    begins = min(event.start_ns() for event in events if event.name() == "backward")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = torch.tensor([size for _, size in changes]).cumsum(dim=0)
    return int(held[sum(start < begins for start, _ in changes) - 1]), int(held.max())


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in ((name, kept) for name in BASES for kept in (False, True))
    ],
)
def test_a_step_holds_what_was_said(name: str, checkpointing: bool) -> None:
    build = partial(mixture_of, name, TopK(k=1), checkpointing)
    run = partial(loss_of, batch_of(name))
    real = build()
    weights = bytes_of([*real.parameters(), *real.buffers()])
    said, (kept, peak) = training_memory(build, run), measured(real, run)
    if checkpointing:  # each block keeps the CPU's random state, 5 KB, which is nothing beside real activations
        blocks = sum(isinstance(module, GradientCheckpointingLayer) for module in real.base.modules())
        kept -= blocks * torch.get_rng_state().numel()
    assert said.kept == pytest.approx(kept, rel=0.1)
    assert said.base + said.adapters == pytest.approx(weights, rel=1e-6)
    assert said.total == pytest.approx(weights + said.optimizer + peak, rel=0.1)


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [(2, 16), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((2, 128), (8, 64)))],
)
@pytest.mark.parametrize(
    "router", ["token", *(pytest.param(name, marks=pytest.mark.slow) for name in ROUTERS if name != "token")]
)
def test_routers_lengths_and_rows_are_told(router: str, rows: int, tokens: int) -> None:
    build = partial(mixture_of, "llama", ROUTERS[router])

    def run(mixture: Mixture) -> Tensor:
        loss: Tensor = mixture(**batch_of("llama", rows, tokens), task=["a", "b"] * (rows // 2)).loss
        return loss

    said, (kept, peak) = training_memory(build, run), measured(build(), run)
    assert said.kept == pytest.approx(kept, rel=0.1)
    assert said.total - said.base - said.adapters - said.optimizer == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_families_are_told(family: type[FamilySpec]) -> None:
    where = Placement(towers=("language",)) if family.causal else Placement(towers=("vision",))
    build = partial(mixture_of, "llava", TopK(k=1), family=family, placement=where)
    run = partial(loss_of, batch_of("llava", tokens=16))
    said, (kept, peak) = training_memory(build, run), measured(build(), run)
    assert said.kept == pytest.approx(kept, rel=0.1)
    assert said.total - said.base - said.adapters - said.optimizer == pytest.approx(peak, rel=0.1)


def test_kept_are_the_tensors_that_autograd_saves() -> None:
    mixture, batch, saved = mixture_of("llama", TopK(k=1)), batch_of("llama"), dict[int, int]()
    own = {tensor.untyped_storage()._cdata for tensor in (*mixture.parameters(), *mixture.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(batch, mixture)
    total = sum(size for key, size in saved.items() if key not in own)
    assert loss.requires_grad
    assert training_memory(partial(mixture_of, "llama", TopK(k=1)), partial(loss_of, batch)).kept == pytest.approx(
        total, rel=0.1
    )


def test_gradients_that_accumulate_are_there_before() -> None:
    run = partial(loss_of, batch_of("llama"))
    once, more = (training_memory(partial(mixture_of, "llama", TopK(k=1)), run, twice) for twice in (False, True))
    assert once.gradients == more.gradients
    assert once.total < more.total <= once.total + once.gradients
    assert more.kept == pytest.approx(once.kept, rel=1e-2)  # the first pass makes a few constants


def test_a_model_without_numbers_takes_no_memory_and_gives_the_shapes() -> None:
    wide = 50_000
    with skeleton():
        layer = torch.nn.Linear(wide, wide)  # 10 GB
        rows = torch.tensor([[True, False, True]]).nonzero()
        found = layer(torch.ones(3, wide))[torch.tensor([True, False, True])]
        assert torch.topk(found, 4).indices.tolist() == [[0] * 4] * 2
        assert bool((found != 0).all())
        assert not bool(found.isnan().any())
    assert rows.tolist() == [[0, 0], [0, 2]]
    assert found.shape == (2, wide)
    assert bytes_of([layer.weight]) == 4 * wide * wide


def test_live_bytes_follow_what_is_made_and_freed() -> None:
    held = torch.zeros(10)
    with LiveBytes([held]) as live:
        one = torch.zeros(100)
        view = one[:50]
        two = one + 1
        assert live.now == 4 * 210
        del one, two
        assert live.now == 4 * 110
        del view
        assert (live.now, live.peak) == (40, 840)
