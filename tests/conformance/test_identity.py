"""Law 1: attaching fresh adapters changes no output."""

import pytest
import torch

from moadapt import RouterSpec
from moadapt.adapters import FamilySpec
from tests.conformance.canonical import (
    EVERYWHERE,
    LANGUAGE,
    TASKS,
    Given,
    Placement,
    family_cases,
    make,
    router_cases,
    routing_value,
    tokens_at,
)
from tests.models import llava_batch, tiny_llava


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "name"), family_cases())
def test_fresh_adapters_change_nothing(family: type[FamilySpec], name: str, dtype: torch.dtype) -> None:
    batch = llava_batch()
    base = tiny_llava().to(dtype)
    with torch.no_grad():
        plain = base(**batch).logits
        placement = LANGUAGE if name.startswith("token") else EVERYWHERE
        router = Given(value=routing_value(name, rows=3, tokens=tokens_at(family)))
        mixture = make(router, placement, family=family, fresh=True, base=base)
        routed = mixture(**batch).logits
    assert torch.equal(plain, routed) is family.identity


@pytest.mark.parametrize(("router", "placement"), router_cases())
def test_fresh_routers_change_nothing(router: RouterSpec, placement: Placement) -> None:
    batch = llava_batch()
    base = tiny_llava()
    with torch.no_grad():
        plain = base(**batch)
        routed = make(router, placement, fresh=True, base=base)(**batch, task=TASKS)
    assert torch.equal(plain.logits, routed.logits)
    assert torch.equal(plain.loss, routed.loss)


@pytest.mark.parametrize(("router", "placement"), router_cases())
def test_trained_adapters_change_every_row(router: RouterSpec, placement: Placement) -> None:
    batch = llava_batch()
    mixture = make(router, placement)
    with torch.no_grad():
        routed = mixture(**batch, task=TASKS).logits
        with mixture.disabled():
            plain = mixture(**batch, task=TASKS).logits
    assert ((routed - plain).abs().amax(dim=(1, 2)) > 1e-2).all()
    assert torch.equal(plain, tiny_llava()(**batch).logits)
