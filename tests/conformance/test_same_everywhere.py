"""Law 8: gradient checkpointing and compilation give what the plain process gives."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from moadapt import Mixture, RouterSpec
from moadapt.adapters import FamilySpec
from moadapt_routers import ByTask, TopK
from tests.conformance.canonical import (
    EVERYWHERE,
    LANGUAGE,
    TASKS,
    Given,
    Placement,
    family_cases,
    make,
    router_cases,
    router_specs,
    routing_value,
    tokens_at,
)
from tests.core.zoo import build
from tests.models import llava_batch, tiny_llama


def step(mixture: Mixture, run: Any = None) -> tuple[Tensor, dict[str, Tensor], dict[str, list[Tensor]]]:
    """Loss, gradients and routings of one training step."""
    mixture.train()
    mixture.zero_grad()
    torch.manual_seed(0)  # some routers sample while they are trained
    batch = llava_batch()
    if isinstance(mixture.base, LlamaForCausalLM):
        del batch["pixel_values"]
    with mixture.trace() as trace:
        loss = (mixture if run is None else run)(**batch, task=TASKS, use_cache=False).loss
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in mixture.named_adapter_parameters() if p.grad is not None}
    return loss.detach(), gradients, trace.routings


def assert_same_step(found: Any, expected: Any, *, rounding: float = 1e-4) -> None:
    """Equal up to rounding, which in a sum whose terms cancel is that of the terms."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        room = max(1e-6, rounding * float(gradient.abs().max()))
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=room, msg=name)
    assert {place: len(each) for place, each in found[2].items()} == {p: len(each) for p, each in expected[2].items()}


@pytest.mark.parametrize(("router", "placement"), router_cases())
def test_checkpointing_a_routed_mixture_gives_the_same_step(router: RouterSpec, placement: Placement) -> None:
    mixture = make(router, placement)
    expected = step(mixture)
    mixture.gradient_checkpointing_enable()
    assert mixture.base.is_activation_checkpointing
    assert_same_step(step(mixture), expected)
    assert_same_step(step(mixture), expected)
    assert mixture.context.call is None


@pytest.mark.parametrize(("family", "name"), family_cases())
def test_checkpointing_a_family_gives_the_same_step(family: type[FamilySpec], name: str) -> None:
    router = Given(value=routing_value(name, rows=3, tokens=tokens_at(family)))
    mixture = make(router, LANGUAGE if name.startswith("token") else EVERYWHERE, family=family)
    expected = step(mixture)
    mixture.gradient_checkpointing_enable()
    assert_same_step(step(mixture), expected)


def test_checkpointing_recomputes_blocks() -> None:
    mixture = make(next(router_specs(depends_on="input")))
    runs: list[str] = []
    block = mixture.base.model.language_model.layers[1].mlp.act_fn
    block.register_forward_hook(lambda *_: runs.append("run"))
    step(mixture)
    assert len(runs) == 1
    mixture.gradient_checkpointing_enable()
    step(mixture)
    assert len(runs) == 3


def test_two_checkpointed_forwards_keep_their_own_routings() -> None:
    """Backward passes run after other calls, and each must find the routing of its own."""
    mixture = make(next(router_specs(depends_on="task")))
    first, second = llava_batch(seed=1), llava_batch(seed=2)

    def gradients() -> list[Tensor]:
        mixture.zero_grad()
        mixture.train()
        losses = [
            mixture(**batch, task=task, use_cache=False).loss for batch, task in ((first, TASKS), (second, TASKS[::-1]))
        ]
        (losses[0] + 2 * losses[1]).backward()
        return [p.grad.clone() for _, p in mixture.named_adapter_parameters()]

    expected = gradients()
    mixture.gradient_checkpointing_enable()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_checkpointed_sites_choose_again_among_the_same_experts() -> None:
    """Routers of sites decide within blocks, whose second run may come when others are available."""
    mixture = make(TopK(k=1, scope="token", per="site"), LANGUAGE)

    def gradients() -> list[Tensor]:
        mixture.zero_grad()
        mixture.train()
        losses = []
        for experts in (["ask", "tell"], ["tell", "find"]):
            with mixture.only(experts):
                losses.append(mixture(**llava_batch(), use_cache=False).loss)
        (losses[0] + 2 * losses[1]).backward()
        return [p.grad.clone() for _, p in mixture.named_adapter_parameters()]

    expected = gradients()
    mixture.gradient_checkpointing_enable()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_checkpointing_costs_no_gradient_of_the_inputs() -> None:
    mixture = make(None, LANGUAGE)
    mixture.gradient_checkpointing_enable()
    mixture.train()
    seen: list[bool] = []
    mixture.base.model.multi_modal_projector.register_forward_hook(lambda m, args, out: seen.append(out.requires_grad))
    mixture(**llava_batch(), use_cache=False).loss.backward()
    assert seen == [False]


def test_a_block_with_dropout_of_its_own_keeps_it_off_and_gets_it_back() -> None:
    mixture = make(None, LANGUAGE)
    block = mixture.base.model.language_model.layers[1]
    block.activation_dropout = 0.1
    mixture.gradient_checkpointing_enable()
    mixture.train()
    assert (block.training, block.activation_dropout) == (True, 0.0)
    mixture.detach()
    assert (block.training, block.activation_dropout) == (False, 0.1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_text_mixture_gives_the_same_step(backend: str) -> None:
    router = next(router for router in router_specs(depends_on="input") if router.per == "layer")
    assert_compiled_same(make(router, LANGUAGE, base=tiny_llama()), backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("router", "placement"), router_cases())
def test_a_compiled_mixture_gives_the_same_step(router: RouterSpec, placement: Placement, backend: str) -> None:
    assert_compiled_same(make(router, placement), backend)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), family_cases())
def test_a_compiled_family_gives_the_same_step(family: type[FamilySpec], name: str) -> None:
    router = Given(value=routing_value(name, rows=3, tokens=tokens_at(family)))
    assert_compiled_same(make(router, LANGUAGE, family=family), "aot_eager")


@pytest.mark.slow
def test_a_mixture_compiled_to_code_gives_the_same_step() -> None:
    mixture = make(next(router_specs(depends_on="input")), EVERYWHERE)
    assert_compiled_same(mixture, "inductor", rounding=1e-3)  # fused kernels add up in another order


def assert_compiled_same(mixture: Mixture, backend: str, **judged: float) -> None:
    torch._dynamo.reset()
    expected = step(mixture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo warns of what it leaves to Python
        compiled = torch.compile(mixture, backend=backend)
        assert_same_step(step(mixture, compiled), expected, **judged)
        assert_same_step(step(mixture, compiled), expected, **judged)
    assert mixture.context.call is None
    torch._dynamo.reset()


def test_a_compiled_mixture_by_task_is_few_graphs() -> None:
    """The hooks around the base and its blocks break the graph, but no site does."""
    mixture = make(ByTask(), LANGUAGE, base=build("llama"))
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ids, task = llava_batch()["input_ids"], torch.tensor([0, 1, 2])
    expected = mixture(input_ids=ids, task=task, use_cache=False).logits
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo warns of what it leaves to Python
        found = torch.compile(mixture, backend=count)(input_ids=ids, task=task, use_cache=False).logits
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(mixture.sites) == 14
    assert len(graphs) < 10
