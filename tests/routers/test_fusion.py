"""Fusion: attention over what the experts of a site give there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moadapt import Placement, Routing, RoutingContext, attach
from moadapt.adapted import AdaptedModule
from moadapt.adapters import Bank, Bottleneck, CrossModal, FamilySpec, LoRA, Prefix
from moadapt_routers import Fusion
from moadapt_routers.fusion import FusionRouter
from tests.conformance.canonical import EXPERTS, TASKS, make
from tests.conformance.test_exact import EXPERTS as COUNT
from tests.conformance.test_exact import FAMILY_PARAMS, PRESENT, ROWS, TOKENS, assert_equal, bank_of, call_of, values_at
from tests.models import llava_batch, randomize, tiny_llava


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_outputs_are_those_of_each_expert_alone(family: type[FamilySpec], flat: bool) -> None:
    bank = bank_of(family, PRESENT)
    x, y = values_at(family, *((7,) if flat else (ROWS, TOKENS)))
    found = bank.expert_outputs(x, y, COUNT + 1, call_of(x))  # more than the bank knows of
    assert found.shape == (*y.shape[:-1], COUNT + 1, y.shape[-1])
    for name, expert in PRESENT.items():
        if expert is not None:
            alone = bank_of(family, {name: None})
            alone.load_state(name, bank.state(name))
            assert_equal(found[..., expert, :], alone(x, y, None, call_of(x)))
    absent = [e for e in range(COUNT + 1) if e not in PRESENT.values()]
    assert torch.equal(found[..., absent, :], torch.zeros_like(found[..., absent, :]))


def test_lora_knows_its_outputs_as_a_bank_that_is_run_does() -> None:
    bank = bank_of(LoRA, PRESENT)
    x, y = values_at(LoRA, ROWS, TOKENS)
    parameters = tuple(bank.parameters())
    found, expected = bank.expert_outputs(x, y, COUNT), Bank.expert_outputs(bank, x, y, COUNT)
    assert_equal(found, expected)
    into = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(each, parameters, into, allow_unused=True) for each in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        if mine is not None and other is not None and bool(other.abs().max() > 1e-12):
            assert_equal(mine, other)


def context(outputs: Tensor, output: Tensor | None = None, **more: Any) -> RoutingContext:
    rows, tokens, _, width = outputs.shape
    return RoutingContext(
        output=torch.randn(rows, tokens, width) if output is None else output, outputs=outputs, **more
    )


def test_weights_are_a_softmax_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    router, outputs, output = FusionRouter(6, 3, width=4), torch.randn(2, 5, 3, 6), torch.randn(2, 5, 6)
    routing = router(context(outputs, output))
    for row in range(2):
        for token in range(5):
            y = output[row, token]
            query = router.query @ ((y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt())
            keys = [router.key @ z / (y.square().mean() + z.square().mean() + 1e-5).sqrt() for z in outputs[row, token]]
            scores = torch.stack([query @ key / 2 for key in keys])
            torch.testing.assert_close(routing.weights[row, token, 0], scores.softmax(-1))


def test_experts_that_give_the_same_weigh_the_same_and_others_follow_their_output() -> None:
    torch.manual_seed(0)
    router, outputs = FusionRouter(6, 3, width=4), torch.randn(2, 5, 1, 6)
    even = router(context(outputs.expand(-1, -1, 3, -1))).weights
    torch.testing.assert_close(even, torch.full_like(even, 1 / 3))
    several, output = torch.randn(2, 5, 3, 6), torch.randn(2, 5, 6)
    weights = router(context(several, output)).weights
    order = [2, 0, 1]
    torch.testing.assert_close(router(context(several[:, :, order], output)).weights, weights[..., order])
    chosen = router(context(several, output, available=torch.tensor([True, False, True]))).weights
    assert not chosen[..., 1].any()


def test_it_grows_and_trims_without_new_parameters() -> None:
    router = FusionRouter(6, 3, width=4)
    router.grow(2)
    assert router.num_experts == router(context(torch.randn(1, 2, 5, 6))).num_experts == 5
    router.trim([4, 0])
    assert router.num_experts == 2


def test_it_learns_which_expert_a_token_needs() -> None:
    """The output's first feature says which of two experts gives what is wanted."""
    torch.manual_seed(0)
    router, width = FusionRouter(8, 2, width=4), 8
    output, outputs = torch.randn(64, 4, width), torch.randn(1, 1, 2, width).expand(64, 4, -1, -1)
    output[..., 0] = 3 * output[..., 0].sign()
    wanted = torch.where(output[..., :1] > 0, outputs[..., 0, :], outputs[..., 1, :])

    def loss() -> Tensor:
        weights = router(context(outputs, output)).weights[:, :, 0]
        return nn.functional.mse_loss(torch.einsum("bte,btef->btf", weights, outputs), wanted)

    optimizer, first = torch.optim.Adam(router.parameters(), lr=0.05), loss().detach()
    for _ in range(150):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert loss().detach() < first / 20


def test_a_site_adds_what_its_experts_give_weighed_by_what_they_give() -> None:
    mixture, batch, seen = make(Fusion(), Placement(modules=("up_proj",), towers=("language",))), llava_batch(), []

    def judge(wrapper: AdaptedModule, args: tuple[Any, ...], output: Tensor) -> None:
        (x,), (bank,), y = args, wrapper.banks, wrapper.module(args[0])
        router = mixture.context.judge(wrapper._site)
        assert isinstance(router, FusionRouter)
        nothing = Routing.constant(torch.zeros(3))
        shared = bank(x, y, nothing)
        outputs = torch.stack([bank(x, y, Routing.constant(one)) - shared for one in torch.eye(3)], dim=2)
        weights = router(RoutingContext(output=y, outputs=outputs)).weights[:, :, 0]
        expected = y + shared + torch.einsum("bte,btef->btf", weights, outputs)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)
        seen.append(wrapper)

    for module in mixture.modules():
        if isinstance(module, AdaptedModule):
            module.register_forward_hook(judge)
    with torch.no_grad():
        mixture(**batch)
    assert len(seen) == 3


def test_two_families_and_ranges_are_judged_together() -> None:
    experts = {"a": LoRA(), "b": LoRA(acts_on="text"), "c": LoRA(lr_ratio=2.0)}
    mixture = attach(tiny_llava(), experts=experts, router=Fusion())
    randomize(mixture)
    for key in (router.key for router in mixture.routers):
        nn.init.normal_(key, std=0.01)
    with torch.no_grad(), mixture.observe() as found:
        mixture.eval()(**llava_batch())
    outputs = [each.seen.outputs for each in found]
    assert all(given is not None and not given[:, :4, 1].any() for given in outputs)  # of image tokens
    assert all(given is not None and bool(given[:, 4:].any(-1).all()) for given in outputs)
    assert all((each.routing.weights.sum(-1) - 1).abs().max() < 1e-5 for each in found)


def test_weights_of_the_users_choice_need_no_outputs() -> None:
    mixture, batch = make(Fusion(), Placement()), llava_batch()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nobody reads the outputs")

    for _, bank in mixture.banks():
        bank.expert_outputs = refuse  # type: ignore[method-assign, assignment]
    with torch.no_grad(), mixture.override({"tell": 1.0}):
        assert mixture(**batch).logits.isfinite().all()


def test_places_without_outputs_are_refused() -> None:
    for per in ("layer", "tower", "model"):
        with pytest.raises(ValueError, match=rf"Fusion decides at each site.*not once a {per}; leave per out"):
            Fusion(per=per)
    with pytest.raises(ValueError, match="Fusion routes by token"):
        Fusion(scope="sequence")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (CrossModal, r"layers\.0 change what enters it, before it gives anything"),
        (Prefix, r"self_attn: the FusionRouter there decides on what .* but Prefix of ask, tell, find changes how"),
    ],
)
def test_experts_whose_outputs_come_too_late_are_refused(family: type[FamilySpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny_llava(), experts={name: family() for name in EXPERTS}, router=Fusion())


def test_sublayers_are_fused_too() -> None:
    mixture = make(Fusion(), Placement(), family=Bottleneck)
    with torch.no_grad():
        assert mixture(**llava_batch(), task=TASKS).logits.isfinite().all()
