"""Norm tuning: every kind of norm, norms of heads, parity with peft, and what cannot be tuned."""

import copy
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from moadapt import Mixture, Placement, Routing, attach
from moadapt.adapters import NormTuning, NotMergeable
from moadapt.adapters.bank import Adapter
from moadapt.adapters.norm_tuning import NormTuningBank
from moadapt.adapters.weighing import over_features
from moadapt.sites import Site
from moadapt_routers import Softmax
from tests.conformance.canonical import Given
from tests.core.zoo import build
from tests.models import llava_batch, randomize

ROWS, TOKENS, HEADS, WIDTH = 2, 4, 3, 8
NORMS: dict[str, nn.Module] = {
    "layer": nn.LayerNorm(WIDTH),
    "layer without bias": nn.LayerNorm(WIDTH, bias=False),
    "llama": LlamaRMSNorm(WIDTH, eps=1e-5),
    "gemma": GemmaRMSNorm(WIDTH, eps=1e-4),
    "t5": T5LayerNorm(WIDTH, eps=1e-6),
}
NAMES = ("shared", "a", "b")


def bank_at(module: nn.Module, bias: Any = "existing") -> NormTuningBank:
    torch.manual_seed(0)
    nn.init.normal_(module.weight)  # type: ignore[arg-type]
    site = Site("layers.0.norm", "language", "norm", 0, WIDTH, WIDTH, "norm", getattr(module, "bias", None) is not None)
    adapters = [Adapter(n, NormTuning(bias=bias), None if n == "shared" else NAMES.index(n) - 1) for n in NAMES]
    bank = NormTuningBank(site, adapters, module)
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


def tuned(bank: NormTuningBank, module: nn.Module, weights: Tensor) -> nn.Module:
    """The module with the adapters' changes put onto its own parameters, the experts' weighted."""
    changed = copy.deepcopy(module)
    for name, weight in zip(NAMES, [1.0, *weights.tolist()], strict=True):
        for tensor, change in bank.state(name).items():
            target = changed.weight if tensor == "gain" else changed.bias
            with torch.no_grad():
                target += weight * change[0]  # type: ignore[operator]
    return changed


@pytest.mark.parametrize("name", NORMS)
def test_a_change_of_gain_is_a_change_of_the_weight(name: str) -> None:
    module = NORMS[name]
    bank, x = bank_at(module), 2 * torch.randn(ROWS, TOKENS, WIDTH) + 1
    weights = torch.rand(ROWS, 1, 1, 2)
    y = module(x)
    found = y + bank(x, y, Routing(weights, 2))
    for row in range(ROWS):
        torch.testing.assert_close(
            found[row], tuned(bank, module, weights[row].flatten())(x[row]), rtol=1e-5, atol=1e-5
        )
    assert bank.tensors == (("gain", "bias") if name == "layer" else ("gain",))


@pytest.mark.parametrize("heads", [HEADS, TOKENS])
@pytest.mark.parametrize("first", ["tokens", "heads"])
def test_norms_of_heads_follow_the_token(first: str, heads: int) -> None:
    """Gemma normalises heads before tokens, Qwen tokens before heads, both in views of one projection."""
    module = NORMS["llama"]
    bank, x = bank_at(module), torch.randn(ROWS, TOKENS, heads, WIDTH)
    weights = torch.rand(ROWS, TOKENS, 1, 2)
    seen = x.transpose(1, 2) if first == "heads" else x
    delta = bank(seen, module(seen), Routing(weights, 2))
    found = delta.transpose(1, 2) if first == "heads" else delta
    for row in range(ROWS):
        for token in range(TOKENS):
            changed = tuned(bank, module, weights[row, token].flatten())
            one = x[row, token]
            torch.testing.assert_close(found[row, token], changed(one) - module(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_norms_of_heads_in_a_model_take_weights_by_token(name: str) -> None:
    """Weights that are the same for every token change what constant weights change."""
    batch = {"input_ids": torch.arange(5, 17).reshape(3, 4)}  # as many tokens as heads
    constant = torch.tensor([0.3, 0.7])
    found = []
    for value in (Routing.constant(constant), Routing(constant.expand(3, 4, 1, 2), 2)):
        where = Placement(modules=("q_norm", "k_norm"))
        mixture = attach(
            build(name), experts={"a": NormTuning(), "b": NormTuning()}, router=Given(value=value), placement=where
        )
        randomize(mixture)
        with torch.no_grad():
            found.append(mixture.eval()(**batch).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_norms_of_transposed_heads_take_weights_by_token() -> None:
    """A token's logits do not depend on later tokens, whether or not there are as many tokens as heads."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = PhiForCausalLM(PhiConfig(vocab_size=67, qk_layernorm=True, **shape)).eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    weights, ids = torch.rand(2, 5, 1, 2), torch.randint(5, 67, (2, 5))
    where = Placement(modules=("q_layernorm", "k_layernorm"))
    found = []
    for tokens in (3, 4, 5):
        given = Given(value=Routing(weights[:, :tokens], 2))
        mixture = attach(base, experts={"a": NormTuning(), "b": NormTuning()}, router=given, placement=where)
        randomize(mixture, scale=1.0)
        with torch.no_grad():
            found.append(mixture.eval()(input_ids=ids[:, :tokens]).logits)
        mixture.detach()
    for tokens, logits in zip((3, 4), found, strict=False):
        torch.testing.assert_close(logits, found[2][:, :tokens], rtol=1e-4, atol=1e-4)


def test_heads_and_tokens_that_cannot_be_told_apart_are_refused() -> None:
    x = torch.ones(1, 1, 1, WIDTH).expand(ROWS, TOKENS, TOKENS, WIDTH)
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 8\) has as many heads as tokens"):
        over_features(torch.ones(ROWS, TOKENS, WIDTH), x, x.clone())


def peft_of(mixture: Mixture, name: str) -> Any:
    """Peft's tuning of the same norms, its copies changed as ours are."""
    targets = sorted({site.path.rpartition(".")[2] for site in mixture.sites})
    theirs = get_peft_model(build(name), LNTuningConfig(target_modules=targets)).eval()
    for site, bank in mixture.banks():
        norm = theirs.base_model.model.get_submodule(site.path).ln_tuning_layers["default"]
        with torch.no_grad():
            norm.weight += bank.state("shared")["gain"][0]
            if "bias" in bank.state("shared"):
                norm.bias += bank.state("shared")["bias"][0]
    return theirs


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning:peft")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_step_and_a_merge_are_those_of_peft(name: str) -> None:
    inputs = {"input_ids": llava_batch()["input_ids"]}
    mixture = attach(build(name), shared=NormTuning()).eval()
    randomize(mixture, 0.1)
    theirs = peft_of(mixture, name)
    ours, expected = mixture(**inputs)[0], theirs(**inputs)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    into = torch.randn_like(ours)
    (ours * into).sum().backward()
    (expected * into).sum().backward()
    for site, bank in mixture.banks():
        norm = theirs.base_model.model.get_submodule(site.path).ln_tuning_layers["default"]
        torch.testing.assert_close(bank.shared_gain.grad[0], norm.weight.grad, rtol=1e-4, atol=1e-5)
    plain, report = mixture.merge("task")
    assert report.exact
    for path, parameter in theirs.merge_and_unload().named_parameters():
        torch.testing.assert_close(plain.get_parameter(path), parameter, rtol=1e-6, atol=1e-6)


def test_every_norm_of_the_language_tower_counts() -> None:
    mixture = attach(build("llama"), shared=NormTuning())
    layers, width = 2, 32
    assert sum(p.numel() for _, p in mixture.named_adapter_parameters()) == (2 * layers + 1) * width


def test_a_router_by_sequence_serves_the_last_norm_too() -> None:
    mixture = attach(build("llama"), experts={"a": NormTuning(), "b": NormTuning()}, router=Softmax())
    assert {place.name for place in mixture.places} == {"language.0", "language.1", "model.norm"}


def test_a_created_bias_trains_but_is_not_merged_where_a_norm_cannot_hold_it() -> None:
    bank = bank_at(NORMS["llama"], bias="all")
    assert bank.tensors == ("gain", "bias")
    with pytest.raises(NotMergeable, match=r"layers\.0\.norm is a LlamaRMSNorm, which has no bias.*bias='existing'"):
        bank.delta(torch.ones(2))
    assert bank_at(nn.LayerNorm(WIDTH, bias=False), bias="all").delta(torch.ones(2)).bias is not None


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * gate


class Exponential(Gated):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.weight.exp() * x


@pytest.mark.parametrize("module", [Gated(), Exponential()], ids=["gated", "exponential"])
def test_a_norm_that_is_not_proportional_to_its_gain_is_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.norm is a \w+, whose output is not its normalised input times"):
        bank_at(module)


def test_an_unknown_choice_of_biases_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bias='some'; choose one of existing, all, none"):
        NormTuning(bias="some")  # type: ignore[arg-type]
