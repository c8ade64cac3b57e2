"""Law 5 in 16 bits: under autocast or on a 16-bit base, adapters and routers stay in float32 and results stay close."""

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, RouterSpec
from moadapt.adapters import FamilySpec
from tests.conformance.canonical import (
    EVERYWHERE,
    LANGUAGE,
    TASKS,
    Given,
    family_cases,
    label,
    make,
    router_specs,
    routing_value,
    tokens_at,
)
from tests.models import llava_batch, randomize, tiny_llava

CLOSE = 0.03
"""Relative distance of bfloat16 results from float32 ones: some eight roundings of 2^-8."""


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def results(mixture: Mixture, *, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of adapters and routers."""
    mixture.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = mixture(**llava_batch(), task=TASKS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in mixture.named_adapter_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["autocast", "base"])
@pytest.mark.parametrize(("family", "name"), family_cases())
def test_sixteen_bits_stay_close(family: type[FamilySpec], name: str, how: str) -> None:
    router = Given(value=routing_value(name, rows=3, tokens=tokens_at(family)))
    placement = LANGUAGE if name.startswith("token") else EVERYWHERE
    mixture = make(router, placement, family=family)
    randomize(mixture, scale=0.1)
    logits, gradients = results(mixture)
    if how == "base":
        mixture = make(router, placement, family=family, base=tiny_llava().to(torch.bfloat16))
        randomize(mixture, scale=0.1)
    assert all(p.dtype == torch.float32 for _, p in mixture.named_adapter_parameters())
    found, found_gradients = results(mixture, autocast=how == "autocast")
    assert apart(found, logits) < CLOSE
    assert gradients.keys() == found_gradients.keys()
    ours, theirs = (torch.cat([g.flatten() for g in each.values()]) for each in (found_gradients, gradients))
    assert ours.dtype == torch.float32
    assert apart(ours, theirs) < 3 * CLOSE


@pytest.mark.parametrize("router", list(router_specs()), ids=label)
def test_routers_decide_in_float32_under_autocast(router: RouterSpec) -> None:
    mixture = make(router, LANGUAGE)
    randomize(mixture, scale=0.1)
    seen: list[torch.dtype] = []
    for module in mixture.routers:
        module.register_forward_hook(lambda module, args, routing: seen.append(routing.weights.dtype))
    logits, _ = results(mixture)
    found, _ = results(mixture, autocast=True)
    assert set(seen) == {torch.float32}
    assert apart(found, logits) < 2 * CLOSE
