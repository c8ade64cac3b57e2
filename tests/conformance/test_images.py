"""Law 9: rows find their images, whatever the number of images and the layout of the vision tower."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, Placement, RouterSpec, attach
from moadapt.adapters import LoRA
from moadapt.image_rows import take_rows
from moadapt.routed import routed_at
from moadapt_routers import ByTask, Constant, Poly, PromptMLP, Softmax, Switch, TopK
from tests.core.pictured import PADDED, PICTURED, Row, batch_of, pictured, rows_with, seen_by
from tests.models import IMAGE_TOKEN, randomize

COUNTS = (0, 1, 2, 3)
ALIKE = (2, 2, 2, 2)
"""For Mllama, whose rows are filled up with pictures that text before its own would read."""
TASKS = ("none", "one", "two", "three")
SEEING = Placement(towers=("vision", "connector"))


def mixture_of(name: str, router: Any) -> tuple[Mixture, list[Row]]:
    """Attach an expert a task before the language tower, and make a row a task."""
    base = pictured(name)
    rows = rows_with(base, name, ALIKE if name == "mllama" else COUNTS)
    mixture = attach(base, experts={task: LoRA(rank=2) for task in TASKS}, router=router, placement=SEEING)
    randomize(mixture)
    return mixture.eval(), rows


def last(mixture: Mixture, **inputs: Any) -> Tensor:
    """Logits of the last token."""
    with torch.no_grad():
        found: Tensor = mixture(**inputs).logits[:, -1]
    return found


ROUTERS = {
    "by_task": ByTask(),
    "layer": Softmax(per="layer"),
    "tower": TopK(per="tower"),
    "site": Softmax(per="site"),
    "model": Softmax(per="model"),
    "prompt": PromptMLP(),
    "token": Softmax(scope="token"),
    "poly": Poly(),
}


def reach(mixture: Mixture, batch: dict[str, Tensor]) -> Tensor:
    """Return which entries of the vision tower's axis each task's expert changes, (tasks, entries)."""

    def seen() -> Tensor:
        return seen_by(mixture.base, lambda: mixture(**batch, task=list(TASKS)))

    before, found = seen(), []
    for task in TASKS:
        own = {bank: bank.state(task) for _, bank in mixture.banks()}
        for bank, state in own.items():
            bank.load_state(task, {name: tensor + 1.0 for name, tensor in state.items()})
        found.append((seen() - before).flatten(1).any(dim=1))
        for bank, state in own.items():
            bank.load_state(task, state)
    return torch.stack(found)


@pytest.mark.parametrize("name", PICTURED)
def test_an_expert_changes_the_patches_of_its_own_rows_and_no_others(name: str) -> None:
    mixture, rows = mixture_of(name, ByTask())
    found = reach(mixture, batch_of(name, rows))
    owners = [row for row, own in enumerate(rows) for entries in own.entries for _ in range(entries)]
    if name == "mllama":  # whose rows all run as many images, some of them padding
        owners = list(range(len(rows)))
    assert torch.equal(found, torch.arange(len(rows)).unsqueeze(1) == torch.tensor(owners))


@pytest.mark.parametrize("name", [name for name in PICTURED if name != "mllama"])
def test_images_whose_rows_cannot_be_told_are_refused(name: str) -> None:
    for router in (ByTask(), Softmax(per="layer"), Softmax(per="model")):
        mixture, rows = mixture_of(name, router)
        batch = batch_of(name, rows)
        if name in PADDED:  # whose layout tells
            batch["pixel_values"] = batch["pixel_values"][:-1]
        else:
            batch["input_ids"][1, batch["input_ids"][1] == IMAGE_TOKEN] = 9
        with pytest.raises(ValueError, match=r"cannot be told.*run rows one by one"):
            mixture(**batch, task=list(TASKS))
        assert mixture.context.call is None


@pytest.mark.parametrize("router", [Constant(), None], ids=["constant", "none"])
@pytest.mark.parametrize("name", PICTURED)
def test_any_images_are_fine_where_no_row_is_steered(name: str, router: RouterSpec | None) -> None:
    base = pictured(name)
    rows = rows_with(base, name, COUNTS)
    mixture = attach(base, shared=LoRA(), experts={"a": LoRA(), "b": LoRA()} if router else None, router=router)
    batch = batch_of(name, rows)
    batch["input_ids"] = batch["input_ids"].flip(0)  # which the base itself would refuse by number alone
    assert last(mixture, **batch).isfinite().all()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", PICTURED)
def test_a_batch_gives_each_row_what_it_gets_alone(name: str, router: str) -> None:
    mixture, rows = mixture_of(name, ROUTERS[router])
    mixed = last(mixture, **batch_of(name, rows), task=list(TASKS))
    for index, row in enumerate(rows):
        alone = last(mixture, **batch_of(name, [row]), task=TASKS[index])
        torch.testing.assert_close(mixed[index], alone[0], rtol=1e-3, atol=1e-3)


VIDEO_TOKEN = 4
GRIDS_OF_VIDEOS = ([2, 2, 2], [2, 2, 4], None, [2, 4, 2])
"""Time, height and width of each row's video, in patches."""


def filmed(rows: list[Row], chosen: Sequence[int]) -> dict[str, Tensor]:
    """Put some of the rows, each with its video behind the text, into a batch of Qwen2.5-VL."""
    shown, grids, pixels = [], [], []
    for row in chosen:
        grid, tokens = GRIDS_OF_VIDEOS[row], rows[row].tokens
        if grid is not None:
            count = grid[0] * grid[1] * grid[2]
            tokens = torch.cat([tokens, torch.full((count // 4,), VIDEO_TOKEN), tokens[-1:]])
            grids.append(grid)
            pixels.append(torch.randn(count, 3 * 2 * 14**2, generator=torch.Generator().manual_seed(row)))
        shown.append(replace(rows[row], tokens=tokens))
    batch = batch_of("qwen2_5_vl", shown)
    batch["mm_token_type_ids"] = batch["mm_token_type_ids"] + 2 * (batch["input_ids"] == VIDEO_TOKEN)
    films = {"video_grid_thw": torch.tensor(grids), "pixel_values_videos": torch.cat(pixels)} if grids else {}
    return batch | films


@pytest.mark.parametrize("router", ["by_task", "layer", "site", "token"])
def test_videos_run_by_themselves_and_are_routed_as_their_rows(router: str) -> None:
    mixture, rows = mixture_of("qwen2_5_vl", ROUTERS[router])
    mixed = last(mixture, **filmed(rows, range(4)), task=list(TASKS))
    for row, task in enumerate(TASKS):
        alone = last(mixture, **filmed(rows, [row]), task=task)
        torch.testing.assert_close(mixed[row], alone[0], rtol=1e-3, atol=1e-3)


def test_recomputation_tells_images_from_videos() -> None:
    mixture, rows = mixture_of("qwen2_5_vl", Softmax(per="site"))
    gradients = []
    for _ in range(2):
        mixture.zero_grad()
        mixture(**filmed(rows, range(4)), task=list(TASKS)).logits.square().sum().backward()
        gradients.append([p.grad.clone() for _, p in mixture.named_adapter_parameters() if p.grad is not None])
        mixture.gradient_checkpointing_enable()
        mixture.train()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_a_router_over_the_model_refuses_images_beside_videos() -> None:
    mixture, rows = mixture_of("qwen2_5_vl", Softmax(per="model"))
    with pytest.raises(ValueError, match="this call holds images and videos"):
        mixture(**filmed(rows, range(4)), task=list(TASKS))


def test_rows_filled_up_with_pictures_are_refused_by_routers_that_would_read_those() -> None:
    base = pictured("mllama")
    rows = rows_with(base, "mllama", (1, 2))
    mixture = attach(base, experts={"a": LoRA(), "b": LoRA()}, router=Softmax(), placement=SEEING)
    with pytest.raises(ValueError, match="would read pictures that only fill up rows"):
        mixture(**batch_of("mllama", rows))


def test_a_router_by_row_is_refused_where_text_reads_images() -> None:
    base = pictured("mllama")
    rows = rows_with(base, "mllama", (1, 1))
    mixture = attach(base, experts={"a": LoRA(), "b": LoRA()}, router=Softmax(per="site"))
    with pytest.raises(ValueError, match=r"cross_attn\.k_proj would read .* but images; use another per"):
        mixture(**batch_of("mllama", rows))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_pixtral"])
def test_tokens_of_other_rows_take_no_room(name: str) -> None:
    base = pictured(name)
    rows = rows_with(base, name, (2, 2))
    switch = Switch(scope="token", capacity=1.0)
    mixture = attach(base, experts={task: LoRA(rank=2) for task in TASKS}, router=switch, placement=SEEING)
    randomize(mixture)
    mixture.train()
    mixed = last(mixture, **batch_of(name, rows))
    for row, own in enumerate(rows):
        torch.testing.assert_close(mixed[row], last(mixture, **batch_of(name, [own]))[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chosen", [(0, 2), (1, 3), (0,), (3,)], ids=str)
@pytest.mark.parametrize("name", [name for name in PICTURED if name != "mllama"])
def test_rows_are_taken_out_with_their_images(name: str, chosen: tuple[int, ...]) -> None:
    base = pictured(name)
    rows = rows_with(base, name, COUNTS)
    batch = batch_of(name, rows)
    found = take_rows(base, batch, chosen, len(rows))
    with torch.no_grad():
        together = base(**batch).logits[list(chosen), -1]
        torch.testing.assert_close(base(**found).logits[:, -1], together, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["idefics3", "llava", "qwen2_5_vl"])
def test_measures_know_whose_an_image_is(name: str) -> None:
    base = pictured(name)
    rows = rows_with(base, name, (0, 1, 2, 1))  # as many images as rows
    router = Softmax(scope="token", per="site")
    mixture = attach(base, experts={task: LoRA(rank=2) for task in TASKS}, router=router, placement=SEEING)
    with mixture.observe() as observed:
        mixture(**batch_of(name, rows), task=list(TASKS))
    worth = torch.arange(4.0).unsqueeze(1).expand(4, 4)
    for each in observed:
        routed = routed_at(each, mixture.experts, mixture.tasks, worth)
        assert routed.tasks is not None
        assert routed.utilities is not None
        assert sorted(set(routed.tasks.tolist())) == [1, 2, 3]
        assert torch.equal(routed.utilities[:, 0].long(), routed.tasks)


@pytest.mark.parametrize("router", ["by_task", "token"])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_second_turn_may_bring_another_image(name: str, router: str) -> None:
    base = pictured(name)
    first, second = (rows_with(base, name, (1,), seed)[0] for seed in (0, 1))
    mixture = attach(base, experts={t: LoRA(rank=2) for t in TASKS}, router=ROUTERS[router], placement=SEEING)
    randomize(mixture)
    mixture.eval()
    whole = batch_of(name, [Row(first.images + second.images, torch.cat([first.tokens, second.tokens]), [])])
    turns = [batch_of(name, [row]) for row in (first, second)]
    expected = last(mixture, **whole, task="two")
    with torch.no_grad():
        begun = mixture(**turns[0], task="two", use_cache=True)
    told = {**turns[1], "attention_mask": whole["attention_mask"], "past_key_values": begun.past_key_values}
    found = last(mixture, **told, task="two")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
