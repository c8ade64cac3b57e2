"""Law 2: training touches no parameter or buffer of the base, and detaching gives the very same model back."""

import pytest
import torch
from torch import Tensor, nn

from moadapt import Mixture, RouterSpec, attach
from moadapt.adapters import FamilySpec
from tests.conformance.canonical import EVERYWHERE, FAMILY_PARAMS, TASKS, Placement, make, router_cases
from tests.models import llava_batch, tiny_llava


def tensors_of(base: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, those that are not saved too."""
    return {name: t.detach().clone() for name, t in (*base.named_parameters(), *base.named_buffers())}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def hooks_of(base: nn.Module) -> list[tuple[str, int]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(path, sum(len(getattr(module, kind)) for kind in kinds)) for path, module in base.named_modules()]


def train(mixture: Mixture, steps: int = 3) -> None:
    """Take a few steps that also decay weights, as would move anything that is not frozen."""
    batch = llava_batch()
    mixture.train()
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        mixture(**batch, task=TASKS).loss.backward()
        optimizer.step()


def assert_trains_only_adapters(mixture: Mixture, base: nn.Module, before: dict[str, Tensor]) -> None:
    own = {name: p.detach().clone() for name, p in mixture.named_adapter_parameters()}
    train(mixture)
    changed = [name for name, p in mixture.named_adapter_parameters() if not torch.equal(p, own[name])]
    assert changed
    assert mixture.detach() is base
    assert_same_tensors(tensors_of(base), before)


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_training_a_family_leaves_the_base_as_it_was(family: type[FamilySpec]) -> None:
    base = tiny_llava()
    before = tensors_of(base)
    assert_trains_only_adapters(make(None, EVERYWHERE, family=family, base=base, fresh=True), base, before)


@pytest.mark.parametrize(("router", "placement"), router_cases())
def test_training_a_router_leaves_the_base_as_it_was(router: RouterSpec, placement: Placement) -> None:
    base = tiny_llava()
    before = tensors_of(base)
    assert_trains_only_adapters(make(router, placement, base=base, fresh=True), base, before)


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_every_adapter_parameter_gets_a_gradient(family: type[FamilySpec]) -> None:
    mixture = make(None, EVERYWHERE, family=family, fresh=True)
    own = {name: p.detach().clone() for name, p in mixture.named_adapter_parameters()}
    train(mixture)
    assert all(p.isfinite().all() and not torch.equal(p, own[name]) for name, p in mixture.named_adapter_parameters())


def test_detach_restores_flags_modes_hooks_and_modules() -> None:
    base = tiny_llava()
    base.train()
    base.get_submodule("model.vision_tower").eval()
    base.lm_head.weight.requires_grad_(False)
    calls: list[str] = []
    base.model.language_model.layers[1].register_forward_pre_hook(lambda module, args: calls.append("mine"))
    base(**llava_batch())  # transformers leaves hooks of its own
    state = {name: t.clone() for name, t in base.state_dict().items()}
    modules = {path: id(module) for path, module in base.named_modules()}
    modes = {path: module.training for path, module in base.named_modules()}
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    hooks = hooks_of(base)

    mixture = make(router_cases()[-1].values[0], EVERYWHERE, base=base)
    mixture.gradient_checkpointing_enable()
    train(mixture, steps=1)
    mixture.train(False)
    assert mixture.detach() is base

    assert {path: id(module) for path, module in base.named_modules()} == modules
    assert {path: module.training for path, module in base.named_modules()} == modes
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    assert hooks_of(base) == hooks
    assert list(base.state_dict()) == list(state)
    assert_same_tensors(dict(base.state_dict()), state)
    assert calls


def test_detach_keeps_gradient_checkpointing_that_the_owner_had_on() -> None:
    base = tiny_llava()
    base.activation_checkpointing_enable()
    functions = {path: getattr(m, "_gradient_checkpointing_func", None) for path, m in base.named_modules()}
    mixture = make(None, EVERYWHERE, base=base)
    mixture.gradient_checkpointing_enable()
    mixture.detach()
    assert base.is_activation_checkpointing
    assert {p: getattr(m, "_gradient_checkpointing_func", None) for p, m in base.named_modules()} == functions


def test_the_base_keeps_dropout_off_while_adapters_train() -> None:
    base = tiny_llava()
    for module in base.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    mixture = make(None, EVERYWHERE, base=base)
    mixture.train()
    batch = llava_batch()
    first, second = mixture(**batch).logits, mixture(**batch).logits
    assert torch.equal(first, second)
    assert mixture.training
    assert not base.training


def test_detached_mixture_refuses_to_run() -> None:
    mixture = make(None, EVERYWHERE)
    mixture.detach()
    batch = llava_batch()
    for act in (lambda: mixture(**batch), lambda: mixture.generate(input_ids=batch["input_ids"])):
        with pytest.raises(ValueError, match="detached"):
            act()


def test_detach_twice_and_attach_again_work() -> None:
    base = tiny_llava()
    mixture = make(None, EVERYWHERE, base=base)
    batch = llava_batch()
    plain = mixture.detach()(**batch).logits
    assert mixture.detach() is base
    assert torch.equal(base(**batch).logits, plain)
    again = attach(base, shared=mixture.spec.shared)
    assert torch.equal(again(**batch).logits, plain)
