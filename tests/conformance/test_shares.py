"""A router says truly whether the weights of every input add up to one."""

import pytest
import torch

from moadapt import RouterSpec
from tests.conformance.canonical import TASKS, Placement, make, router_cases, weights_by_place
from tests.models import llava_batch


@pytest.mark.parametrize(("router", "placement"), router_cases())
def test_weights_add_up_to_one_where_the_router_says_so(router: RouterSpec, placement: Placement) -> None:
    found = weights_by_place(make(router, placement), **llava_batch(), task=TASKS)
    sums = torch.cat([weights.sum(-1).flatten() for weights in found.values()])
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5) == router.sums_to_one
