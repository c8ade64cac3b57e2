"""How much adapters add and over how many directions, on hand-made tensors and in a training that does not notice."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moadapt.adapted import AdaptedModule
from moadapt.training.delta_log import LogDeltas, effective_rank, effective_ranks
from tests.training.test_gradient_log import fit, module


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_equal_singular_values_have_all_of_the_rank(rank: int) -> None:
    left, right = (nn.init.orthogonal_(torch.empty(rank, width)) for width in (7, 9))
    assert float(effective_rank(left, 3 * right)) == pytest.approx(rank, rel=1e-5)
    assert float(effective_rank(left, torch.zeros_like(right))) == 0


def test_the_effective_rank_is_that_of_the_whole_matrix() -> None:
    down, up = torch.randn(4, 8), torch.randn(4, 6)
    values = torch.linalg.svdvals(up.mT @ down)[:4]
    shares = values / values.sum()
    assert float(effective_rank(down, up)) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-4)


def test_a_fresh_adapter_has_no_rank_and_others_have_theirs(base: str) -> None:
    made = module(base)
    found = effective_ranks(made.mixture)
    assert set(found) == {"shared", "small", "large"}
    assert all(1 <= found[name] <= most for name, most in {"shared": 2, "small": 2, "large": 3}.items())
    with torch.no_grad():
        for _, bank in made.mixture.banks():
            for name, parameter in bank.named_parameters():
                parameter.zero_() if "shared" in name else None
    assert set(effective_ranks(made.mixture)) == {"small", "large"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_contributions_are_logged_and_change_no_bit(tmp_path: Path, base: str, checkpointing: bool) -> None:
    found, logged = [], {}
    for callbacks in ([], [LogDeltas(every_n_steps=2)]):
        made = module(base, gradient_checkpointing=checkpointing)
        done = fit(tmp_path, base, made, *callbacks, max_steps=3)
        found.append({name: tensor.clone() for name, tensor in made.tensors().items()})
        logged = {name: float(value) for name, value in done.callback_metrics.items()}
        hooks = [m._forward_hooks for m in made.mixture.base.modules() if isinstance(m, AdaptedModule)]
        assert not any(hooks)
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())
    assert {"contribution/vision", "contribution/language", "effective_rank/shared"} <= set(logged)


def test_a_contribution_is_the_norm_of_what_is_added_beside_the_layer(tmp_path: Path, base: str) -> None:
    made = module(base)
    sums: dict[str, list[float]] = {}

    def note(tower: str, wrapper: AdaptedModule, given: torch.Tensor, output: torch.Tensor) -> None:
        with torch.no_grad():
            plain = nn.functional.linear(given, wrapper.module.weight, wrapper.module.bias)
            own = sums.setdefault(tower, [0.0, 0.0])
            own[0] += float((output - plain).double().square().sum())
            own[1] += float(plain.double().square().sum())

    for site in made.mixture.sites:
        wrapper = made.mixture.base.get_submodule(site.path)
        wrapper.register_forward_hook(lambda m, args, out, tower=site.tower: note(tower, m, args[0], out))
    done = fit(tmp_path, base, made, LogDeltas(), max_steps=1)
    for tower, (own, plain) in sums.items():
        assert float(done.callback_metrics[f"contribution/{tower}"]) == pytest.approx((own / plain) ** 0.5, rel=1e-4)
