"""Rescalings: their default sites, parity with peft's IA3, and the frozen layer run once."""

from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moadapt import Mixture, Placement, attach
from moadapt.adapters import Scale
from moadapt_routers import Constant
from tests.core.zoo import build
from tests.models import VOCABULARY, llava_batch, randomize, tiny_llava

TARGETS = {"k_proj": False, "v_proj": False, "down_proj": True}
"""Modules that IA3 takes in a Llama, and whether it takes them as feed-forward ones, whose input is rescaled."""


def biased_llama() -> LlamaForCausalLM:
    """A Llama in float64 with random biases everywhere."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        )
    ).double()  # fmt: skip
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return base.eval()


def text_batch() -> dict[str, Tensor]:
    batch = llava_batch()
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def hosted_by_peft(mixture: Mixture, feedforward: list[str]) -> Any:
    """Peft's IA3 on the same base, with the same vectors."""
    config = IA3Config(target_modules=list(TARGETS), feedforward_modules=feedforward)
    theirs = get_peft_model(biased_llama(), config).double()
    for site, bank in mixture.banks():
        vector = theirs.base_model.model.get_submodule(site.path).ia3_l["default"]
        with torch.no_grad():
            vector.copy_(1 + bank.state("shared")["scale"].reshape(vector.shape))
    return theirs.eval()


@pytest.mark.parametrize("side", [None, "output"])
def test_a_step_and_a_merge_are_those_of_peft(side: Any) -> None:
    mixture = attach(biased_llama(), shared=Scale(side=side)).double().eval()
    randomize(mixture)
    theirs = hosted_by_peft(mixture, [name for name, inner in TARGETS.items() if inner and side is None])
    ours, expected = mixture(**text_batch()), theirs(**text_batch())
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-6, atol=1e-6)
    ours.loss.backward()
    expected.loss.backward()
    for site, bank in mixture.banks():
        vector = theirs.base_model.model.get_submodule(site.path).ia3_l["default"]
        torch.testing.assert_close(bank.shared_scale.grad.flatten(), vector.grad.flatten(), rtol=1e-6, atol=1e-9)
    plain, report = mixture.merge("task")
    assert report.exact
    for name, parameter in theirs.merge_and_unload().named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), parameter, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"k_proj", "v_proj", "down_proj"}),
        ("bert", {"key", "value", "output.dense"}),
        ("vit", {"k_proj", "v_proj", "fc2"}),
        ("t5", {"k", "v", "wo"}),
        ("blip2", {"k_proj", "v_proj", "fc2"}),
    ],
)
def test_keys_values_and_the_end_of_each_mlp_are_the_default(name: str, expected: set[str]) -> None:
    mixture = attach(build(name), shared=Scale())
    found = {end for site in mixture.sites for end in expected if site.path.endswith("." + end)}
    assert found == expected
    assert all(any(site.path.endswith("." + end) for end in expected) for site in mixture.sites)
    inner = {site.path for site, bank in mixture.banks() if not bank.reads_output}
    assert inner == {site.path for site in mixture.sites if site.kind == "mlp"}


def test_a_placement_takes_any_linear_layer() -> None:
    mixture = attach(
        tiny_llava(), shared=Scale(side="input"), placement=Placement(modules=("q_proj",), towers=("language",))
    )
    assert {path.rpartition(".")[2] for path in (site.path for site in mixture.sites)} == {"q_proj"}
    assert sum(p.numel() for _, p in mixture.named_adapter_parameters()) == 3 * 32


def test_an_input_is_rescaled_by_one_run_of_the_frozen_layer() -> None:
    where = Placement(modules=("down_proj",))
    mixture = attach(tiny_llava(), experts={"a": Scale(), "b": Scale()}, router=Constant(), placement=where).eval()
    randomize(mixture)
    runs: list[str] = []
    for site in mixture.sites:
        mixture.base.get_submodule(site.path).module.register_forward_hook(lambda *_: runs.append("run"))
    mixture(**llava_batch())
    assert len(runs) == len(mixture.sites)


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"side='middle'; choose output or input"):
        Scale(side="middle")  # type: ignore[arg-type]
