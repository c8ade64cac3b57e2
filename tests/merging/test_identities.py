"""What published merge methods are known to give in special cases, on true changes of weights."""

import pytest
import torch

import moadapt
from moadapt.adapters import LoRA
from moadapt.merging.elementwise import largest
from moadapt.merging.factored import factored
from moadapt.merging.knots import aligned
from moadapt.merging.statistics import adapters_of
from moadapt.mixture import Mixture
from moadapt_routers import Constant
from tests.merging.planted import TASKS, change_of, changes, method_of, mixture_of
from tests.models import randomize, tiny_llava


def own(mixture: Mixture) -> dict[str, list[torch.Tensor]]:
    """Each expert's true change, by module path."""
    return {at.site.path: [change_of([each]) for each in at.own] for at in adapters_of(mixture)}


def shared(mixture: Mixture) -> dict[str, torch.Tensor]:
    return {at.site.path: change_of([at.shared]) for at in adapters_of(mixture)}


def test_dare_that_drops_nothing_is_task_arithmetic() -> None:
    mixture = mixture_of(*TASKS)
    found, expected = (changes(method_of(n, density=1.0), mixture) for n in ("dare", "task_arithmetic"))
    for path, deltas in found.items():
        torch.testing.assert_close(change_of(deltas), change_of(expected[path]), rtol=1e-5, atol=1e-6)


def test_dare_keeps_its_share_and_its_mean() -> None:
    mixture = mixture_of("a", shared=False)
    path = next(iter(own(mixture)))
    drawn = torch.stack([change_of(changes(method_of("dare", density=0.25, seed=s), mixture)[path]) for s in range(40)])
    whole = own(mixture)[path][0]
    assert float((drawn != 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], (whole / 0.25).expand_as(drawn)[kept], rtol=1e-5, atol=1e-6)
    assert float((drawn.mean(0) - whole).norm() / whole.norm()) == pytest.approx((3 / 40) ** 0.5, rel=0.1)


def test_ties_of_one_adapter_is_that_adapter() -> None:
    mixture = mixture_of("a", shared=False)
    for path, deltas in changes(method_of("ties", density=1.0), mixture).items():
        torch.testing.assert_close(change_of(deltas), own(mixture)[path][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ties", "knots"])
def test_opposite_adapters_cancel(name: str) -> None:
    experts = {"a": LoRA(rank=2, alpha=4), "b": LoRA(rank=3, alpha=6)}
    mixture = moadapt.attach(tiny_llava(), experts=experts, router=Constant(weights=(0.5, 0.5)))
    randomize(mixture)
    for _, bank in mixture.banks():
        state = bank.state("a")
        none = {part: torch.zeros(1, tensor.shape[1]) for part, tensor in state.items()}
        bank.load_state(
            "b", {"down": torch.cat([state["down"], none["down"]]), "up": -torch.cat([state["up"], none["up"]])}
        )
    whole = max(float(each[0].norm()) for each in own(mixture).values())
    for deltas in changes(method_of(name, density=1.0), mixture).values():
        assert float(change_of(deltas).abs().max()) < 1e-5 * whole


def test_ties_is_trim_elect_and_mean_number_by_number() -> None:
    mixture = mixture_of(*TASKS)
    found = changes(method_of("ties", density=0.3, scale=0.7), mixture)
    for path, each in own(mixture).items():
        kept = []
        for change in each:
            count = round(0.3 * change.numel())
            threshold = change.abs().flatten().sort(descending=True).values[count - 1]
            kept.append(torch.where(change.abs() >= threshold * (1 - 1e-6), change, 0.0))
        stack = torch.stack(kept)
        sign = stack.sum(0).sign()
        agrees = (stack.sign() == sign) & (stack != 0)
        mean = (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        torch.testing.assert_close(change_of(found[path]), shared(mixture)[path] + 0.7 * mean, rtol=1e-4, atol=1e-5)


def test_magnitude_keeps_the_largest() -> None:
    change = torch.tensor([[1.0, -5.0], [3.0, -2.0]])
    assert largest(change, 0.5).tolist() == [[0.0, -5.0], [3.0, 0.0]]
    mixture = mixture_of(*TASKS)
    for path, deltas in changes(method_of("magnitude", density=0.5), mixture).items():
        expected = sum(largest(each, 0.5) for each in own(mixture)[path])
        torch.testing.assert_close(change_of(deltas), shared(mixture)[path] + expected, rtol=1e-4, atol=1e-5)


def test_cat_is_the_weighted_sum_and_takes_negative_weights() -> None:
    mixture = mixture_of(*TASKS)
    weights = {"vqa": 0.4, "grounding": -1.3}
    for path, deltas in changes(method_of("cat", weights=weights), mixture).items():
        first, _, last = own(mixture)[path]
        expected = shared(mixture)[path] + 0.4 * first - 1.3 * last
        torch.testing.assert_close(change_of(deltas), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'cat' has a weight for 'vqq'; the experts are vqa, captioning, grounding"):
        mixture.merge("cat", weights={"vqq": 1.0})


def test_knots_writes_every_expert_in_one_basis() -> None:
    """`U S V_e` is expert e's change again, and the stacked V's have orthonormal rows."""
    mixture = mixture_of(*TASKS)
    for at in adapters_of(mixture):
        terms = factored(at)
        assert terms is not None
        up, inner = aligned(terms, (0, 1, 2))
        stacked = torch.cat(inner, dim=1).double()
        torch.testing.assert_close(stacked @ stacked.T, torch.eye(len(stacked)).double(), rtol=0, atol=1e-4)
        for side, change in zip(inner, own(mixture)[at.site.path], strict=True):
            torch.testing.assert_close(up.double().T @ side.double(), change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
@pytest.mark.parametrize("name", ["ties", "dare", "magnitude", "knots"])
def test_a_density_that_is_no_share_is_refused(name: str, density: float) -> None:
    with pytest.raises(ValueError, match=f"merge '{name}' got density={density}; give the share"):
        method_of(name, density=density)
