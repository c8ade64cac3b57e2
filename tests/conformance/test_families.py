"""The laws over every family and every way to weigh it: shared, by task, by sequence and by token, at its own sites."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, Router, RouterSpec
from moadapt.adapters import FamilySpec, NotMergeable
from moadapt.adapters.bank import Adapter
from moadapt.registry import FAMILIES
from moadapt_routers import ByTask, Softmax
from tests.conformance.canonical import EXPERTS, LANGUAGE, TASKS, make
from tests.models import IMAGE_TOKEN, llava_batch, ragged_prompts, randomize, rows_of, tiny_llava, unpadded

ROUTERS: dict[str, tuple[RouterSpec | None, frozenset[str]]] = {
    "shared": (None, frozenset()),
    "task": (ByTask(), frozenset({"row"})),
    "sequence": (Softmax(), frozenset({"row"})),
    "token": (Softmax(scope="token"), frozenset({"row", "token"})),
}
"""Routers and what routings a family must take for them, see `FamilySpec.routes`."""
CASES = [
    pytest.param(family, router, id=f"{name}-{how}")
    for name, family in FAMILIES
    for how, (router, asked) in ROUTERS.items()
    if asked <= family.routes
]
over_all = pytest.mark.parametrize(("family", "router"), CASES)
over_routed = pytest.mark.parametrize(("family", "router"), [case for case in CASES if case.values[1] is not None])
NEW = 4
FIXED = {"min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN]}


def trained(family: type[FamilySpec], router: RouterSpec | None, **how: Any) -> Mixture:
    """A mixture whose adapters and routers have weights that matter, at the family's own sites."""
    return make(router, LANGUAGE, family=family, **how)


def logits(mixture: Mixture, batch: dict[str, Tensor], task: Any = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = mixture(**batch, task=TASKS if task is None else task).logits
    return found


def generate(mixture: Mixture, prompt: dict[str, Tensor], task: Any = None, **how: Any) -> Tensor:
    found: Tensor = mixture.generate(**prompt, task=TASKS if task is None else task, do_sample=False, **FIXED, **how)
    return found[:, prompt["input_ids"].shape[1] :]


def routers_of(mixture: Mixture) -> Iterator[Router]:
    for router in mixture.routers:
        assert isinstance(router, Router)
        yield router


@over_all
def test_a_cache_changes_no_token(family: type[FamilySpec], router: RouterSpec | None) -> None:
    mixture, prompt = trained(family, router), ragged_prompts()
    assert torch.equal(generate(mixture, prompt), generate(mixture, prompt, use_cache=False))


@over_all
def test_a_batch_gives_what_its_rows_give_alone(family: type[FamilySpec], router: RouterSpec | None) -> None:
    mixture, prompt = trained(family, router), ragged_prompts()
    alone = [generate(mixture, unpadded(prompt, row), TASKS[row]) for row in range(3)]
    assert torch.equal(generate(mixture, prompt), torch.cat(alone))


@over_all
def test_a_mixed_batch_gives_what_one_task_at_a_time_gives(family: type[FamilySpec], router: RouterSpec | None) -> None:
    mixture, batch = trained(family, router), llava_batch(rows=6)
    order = [0, 3, 1, 4, 2, 5]
    mixed = logits(mixture, rows_of(batch, *order), [TASKS[row % 3] for row in order])
    for start, task in enumerate(TASKS):
        alone = logits(mixture, rows_of(batch, start, start + 3), task)
        torch.testing.assert_close(mixed[2 * start : 2 * start + 2], alone, rtol=1e-4, atol=1e-4)


@over_all
def test_disabled_adapters_leave_the_base_bit_for_bit(family: type[FamilySpec], router: RouterSpec | None) -> None:
    mixture, batch = trained(family, router), llava_batch()
    with torch.no_grad():
        plain = tiny_llava()(**batch).logits
    with mixture.disabled():
        assert torch.equal(logits(mixture, batch), plain)
    apart = (logits(mixture, batch) - plain).abs().amax(dim=(1, 2))
    assert (apart > 1e-3).all()  # in every row they change something


@over_routed
def test_the_order_of_the_experts_does_not_matter(family: type[FamilySpec], router: RouterSpec) -> None:
    mixture, batch, order = trained(family, router), llava_batch(), [2, 0, 1]
    expected = logits(mixture, batch)
    for _, bank in mixture.banks():
        bank.trim([EXPERTS[expert] for expert in order])
    for each in routers_of(mixture):
        each.trim(order)
    found = logits(mixture, batch, torch.tensor([order.index(task) for task in range(3)]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@over_routed
def test_a_new_expert_changes_no_old_route(family: type[FamilySpec], router: RouterSpec) -> None:
    mixture, batch = trained(family, router), llava_batch()
    expected = logits(mixture, batch)
    for _, bank in mixture.banks():
        bank.grow(Adapter("new", family(), len(EXPERTS)))
    for each in routers_of(mixture):
        each.grow(1)
    with _available(mixture, torch.tensor([True, True, True, False])):
        torch.testing.assert_close(logits(mixture, batch), expected, rtol=1e-4, atol=1e-4)


@over_all
def test_two_steps_reach_every_adapter_and_nothing_else(family: type[FamilySpec], router: RouterSpec | None) -> None:
    base, batch = tiny_llava(), llava_batch()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    mixture = trained(family, router, base=base, fresh=True).train()
    own = dict(mixture.named_adapter_parameters())
    assert {name for name, p in mixture.named_parameters() if p.requires_grad} <= set(own)
    optimizer = torch.optim.AdamW([p for p in own.values() if p.requires_grad], lr=0.02, weight_decay=0.1)
    reached: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        mixture(**batch, task=TASKS).loss.backward()
        for name, parameter in own.items():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
                reached |= {name} if bool(parameter.grad.any()) else set()
        optimizer.step()
    assert reached == {name for name, parameter in own.items() if parameter.requires_grad and parameter.numel()}
    mixture.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@over_all
def test_a_merge_is_exact_says_how_far_it_is_or_refuses(family: type[FamilySpec], router: RouterSpec | None) -> None:
    mixture, batch = trained(family, router, base=tiny_llava().double()).double(), llava_batch()
    randomize(mixture, scale=0.1)
    batch["pixel_values"] = batch["pixel_values"].double()
    exact = router is None or router.depends_on == "task"
    options: dict[str, Any] = {"task": "tell"} | ({} if exact else {"calibration": batch})
    if not family.mergeable:
        with pytest.raises(NotMergeable):
            mixture.merge("task", **options)
        return
    plain, report = mixture.merge("task", **options)
    with torch.no_grad():
        merged = plain(**batch).logits
    if exact:
        assert report.exact
        torch.testing.assert_close(merged, logits(mixture, batch, "tell"), rtol=1e-6, atol=1e-6)
    else:
        assert not report.exact
        assert min(report.sites.values()) > 0
        assert report.output_kl is not None
        assert report.output_kl > 0


@contextmanager
def _available(mixture: Mixture, experts: Tensor) -> Iterator[None]:
    before, mixture.context.available = mixture.context.available, experts
    try:
        yield
    finally:
        mixture.context.available = before
