"""Gradients of the shared adapter task by task, from one backward pass, are those of one pass a task."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moadapt import Mixture, Placement, attach
from moadapt.adapters import FamilySpec, LoRA, PeftTuner
from moadapt.registry import FAMILIES
from moadapt_routers import ByTask, Fusion, Poly, TopK
from tests.conformance.canonical import (
    EVERYWHERE,
    LANGUAGE,
    ROUTINGS,
    TASKS,
    Given,
    exact,
    make,
    routing_value,
    tokens_at,
)
from tests.core.pictured import PICTURED, batch_of, pictured, rows_with
from tests.models import IMAGE_TOKEN, llava_batch, randomize, tiny_llama, tiny_llava

OF_ROWS = torch.tensor([0, 2, 0, 1])
"""Of four tasks the last has no row."""
COUNT = 4
Losses = Callable[[], Tensor]
COPIED = [(name, family) for name, family in FAMILIES if family is not PeftTuner]
over_families = pytest.mark.parametrize("family", [pytest.param(family, id=name) for name, family in COPIED])


def of_answers(mixture: Mixture, run: Any = None) -> Losses:
    """What returns the loss of each of four rows, (4,)."""
    batch = exact(llava_batch(rows=4))
    if not hasattr(mixture.base.config, "vision_config"):
        del batch["pixel_values"]
    targets = batch["labels"][:, 1:]

    def losses() -> Tensor:
        logits = (mixture if run is None else run)(**batch, task=[*TASKS, "ask"], use_cache=False).logits
        told = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        return -(told * (targets >= 0)).sum(dim=1)

    return losses


def gradients_of(mixture: Mixture) -> dict[nn.Parameter, Tensor]:
    return {p: p.grad.clone() for _, p in mixture.named_adapter_parameters() if p.grad is not None}


def from_one_pass(mixture: Mixture, losses: Losses) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
    """Losses, and the gradients of the copies; those of everything are left where they are."""
    mixture.zero_grad()
    copies, found = mixture.copy_shared(COUNT), {}
    for parameter, copied in copies.take().items():
        found[parameter] = torch.zeros_like(copied)
        copied.register_hook(found[parameter].add_)
    with mixture.using(copies.used_by(OF_ROWS)):
        values = losses()
    values.sum().backward()
    return values.detach(), found


def check(mixture: Mixture, losses: Losses, plain: Losses | None = None, tolerance: float = 1e-10) -> None:
    """Hold what one pass gives against a pass for each task by itself, and one for all of them."""
    room = {"rtol": tolerance, "atol": tolerance / 100}
    values, copied = from_one_pass(mixture, losses)
    whole = gradients_of(mixture)
    assert max(gradients.abs().max() for gradients in copied.values()) > 1e-3
    plain = losses if plain is None else plain
    for task in range(COUNT):
        mixture.zero_grad()
        expected = plain()
        torch.testing.assert_close(values, expected.detach(), rtol=tolerance, atol=0)
        expected[task == OF_ROWS].sum().backward()
        for parameter, gradients in copied.items():
            alone = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradients[task], alone, **room)
    mixture.zero_grad()
    plain().sum().backward()
    together = gradients_of(mixture)
    assert whole.keys() == together.keys()
    for parameter, gradient in together.items():
        torch.testing.assert_close(whole[parameter], gradient, **room)


@over_families
def test_a_shared_adapter_alone(family: type[FamilySpec]) -> None:
    mixture = make(None, family=family).double().train()
    check(mixture, of_answers(mixture))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(
            family, name, id=f"{short}-{name}", marks=() if family is LoRA or name == "task" else pytest.mark.slow
        )
        for short, family in COPIED
        for name in (ROUTINGS if family is LoRA else ("task", "token_dense"))
        if ROUTINGS[name] <= family.routes and name != "blended"
    ],
)
def test_a_shared_adapter_beside_experts(family: type[FamilySpec], name: str) -> None:
    value = routing_value(name, rows=4, tokens=tokens_at(family), dtype=torch.float64)
    placement = LANGUAGE if name.startswith("token") else EVERYWHERE
    mixture = make(Given(value=value), placement, family=family).double().train()
    check(mixture, of_answers(mixture))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=() if name in ("lora", "prefix", "cross_modal") else pytest.mark.slow)
        for name, family in COPIED
    ],
)
def test_recomputed_blocks_use_the_same_copies(family: type[FamilySpec]) -> None:
    mixture = make(ByTask(), family=family).double().train()
    mixture.gradient_checkpointing_enable()
    check(mixture, of_answers(mixture))


def test_compiled_code_uses_them_too() -> None:
    mixture = make(TopK(k=1), LANGUAGE, base=tiny_llama()).double().train()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo warns of what it leaves to Python
        compiled = torch.compile(mixture, backend="aot_eager")
        check(mixture, of_answers(mixture, compiled), of_answers(mixture), tolerance=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", PICTURED)
def test_rows_find_their_copies_in_every_tower(name: str) -> None:
    base = pictured(name)
    rows = rows_with(base, name, (2, 2, 2, 2) if name == "mllama" else (0, 1, 2, 3))
    mixture = attach(base, shared=LoRA(rank=2), placement=EVERYWHERE)
    randomize(mixture)
    mixture.double().train()
    batch = exact(batch_of(name, rows))
    check(mixture, lambda: mixture(**batch, use_cache=False).logits[:, -1].square().sum(dim=-1), tolerance=1e-6)


def test_a_start_that_is_taken_off_is_copied_along() -> None:
    mixture = attach(tiny_llava(), shared=LoRA(rank=2, init="pissa"), placement=LANGUAGE)
    randomize(mixture)
    mixture.double().train()
    check(mixture, of_answers(mixture))


def test_a_router_that_judges_outputs_sees_the_same() -> None:
    mixture = make(Fusion(), LANGUAGE).double().train()
    check(mixture, of_answers(mixture), tolerance=1e-6)


def test_a_bias_of_the_up_factor_is_copied_along() -> None:
    lora = LoRA(rank=2, bias=True)
    mixture = attach(tiny_llava(), shared=lora, experts=dict.fromkeys(TASKS, lora), router=Fusion())
    randomize(mixture)
    mixture.double().train()
    check(mixture, of_answers(mixture), tolerance=1e-6)


def test_gates_that_move_act_on_the_copies() -> None:
    mixture = make(ByTask(), LANGUAGE).double().train()
    copies, losses = mixture.copy_shared(COUNT), of_answers(mixture)
    for _, bank in mixture.banks():
        bank.gate({"shared": 0.25, "ask": 0.5})
    copies.take()
    with mixture.using(copies.used_by(OF_ROWS)):
        found = losses()
    torch.testing.assert_close(found, losses(), rtol=1e-10, atol=0)


def test_images_of_unknown_rows_are_refused() -> None:
    mixture = attach(tiny_llava(), shared=LoRA(), placement=Placement(towers=("vision",)))
    batch = llava_batch(rows=4)
    batch["input_ids"][1, batch["input_ids"][1] == IMAGE_TOKEN] = 9
    copies = mixture.copy_shared(COUNT)
    copies.take()
    with pytest.raises(ValueError, match=r"cannot be told task by task"), mixture.using(copies.used_by(OF_ROWS)):
        mixture(**batch)


@pytest.mark.parametrize(
    ("mixture", "word"),
    [
        (lambda: make(ByTask(), shared=False), "none is trained"),
        (lambda: make(None, family=PeftTuner), "PeftTuner"),
        (lambda: make(Poly()), "blends the parameters"),
    ],
    ids=["none", "peft", "blended"],
)
def test_what_allows_no_copies_is_refused(mixture: Callable[[], Mixture], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        mixture().copy_shared(COUNT)
