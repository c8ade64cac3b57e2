"""What routers say of their weights holds: what they add up to, what they blend, and in how many heads."""

import pytest
import torch

from moadapt import RouterSpec
from tests.conformance.canonical import (
    LANGUAGE,
    TASKS,
    Placement,
    label,
    make,
    router_cases,
    router_specs,
    weights_by_place,
)
from tests.models import llava_batch


@pytest.mark.parametrize(("router", "placement"), [case for case in router_cases() if case.values[0].sums_to_one])
def test_weights_add_up_to_one_where_the_router_says_so(router: RouterSpec, placement: Placement) -> None:
    found = weights_by_place(make(router, placement), **llava_batch(), task=TASKS)
    sums = torch.cat([weights.sum(-1).flatten() for weights in found.values()])
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


@pytest.mark.parametrize("router", list(router_specs()), ids=label)
def test_weights_blend_what_the_router_says(router: RouterSpec) -> None:
    mixture = make(router, LANGUAGE)
    with torch.no_grad(), mixture.observe() as observed:
        mixture(**llava_batch(), task=TASKS)
    assert observed
    for each in observed:
        assert each.routing.combines == router.combines
        assert each.routing.weights.shape[2] == router.num_heads
