"""Weights of every input add up to one where a router says so."""

import pytest
import torch

from moadapt import RouterSpec
from tests.conformance.canonical import TASKS, Placement, make, router_cases, weights_by_place
from tests.models import llava_batch


@pytest.mark.parametrize(("router", "placement"), [case for case in router_cases() if case.values[0].sums_to_one])
def test_weights_add_up_to_one_where_the_router_says_so(router: RouterSpec, placement: Placement) -> None:
    found = weights_by_place(make(router, placement), **llava_batch(), task=TASKS)
    sums = torch.cat([weights.sum(-1).flatten() for weights in found.values()])
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
