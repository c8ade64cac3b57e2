"""Several banks at one site, and how the modules there are called."""

import pytest
import torch
from torch import Tensor

from moadapt import Placement, attach
from moadapt.adapters import Bottleneck, FamilySpec, LoRA, NormTuning, Prefix
from moadapt.adapters.bank import Adapter
from moadapt_routers import ByTask, Constant
from tests.conformance.canonical import EXPERTS, FAMILY_PARAMS, Given, make, routing_value
from tests.core.zoo import TEXT
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava


def test_a_shared_adapter_needs_not_follow_the_experts_routing() -> None:
    routing = Given(value=routing_value("heads", rows=3, tokens=1))
    kinds = Placement(kinds=("attention",))
    mixture = attach(
        tiny_llava(), shared=Prefix(), experts=dict.fromkeys(EXPERTS, Bottleneck()), router=routing, placement=kinds
    )
    randomize(mixture)
    with torch.no_grad():
        assert mixture.eval()(**llava_batch()).logits.isfinite().all()


def test_a_shared_adapter_is_not_blended() -> None:
    routing = Given(value=routing_value("blended", rows=3, tokens=1))
    mixture = attach(tiny_llava(), shared=LoRA(lr_ratio=2.0), experts=dict.fromkeys(EXPERTS, LoRA()), router=routing)
    randomize(mixture)
    with torch.no_grad():
        assert mixture.eval()(**llava_batch()).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_a_routing_may_be_older_than_an_expert(family: type[FamilySpec]) -> None:
    mixture, batch = make(Constant(), Placement(), family=family), llava_batch()

    def logits() -> Tensor:
        with torch.no_grad(), mixture.override({"tell": 0.7}):
            found: Tensor = mixture(**batch).logits
        return found

    expected = logits()
    for _, bank in mixture.banks():
        bank.grow(Adapter("new", family(), len(EXPERTS)))
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)


def test_two_stacks_that_run_a_module_are_refused_when_attached() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = {key: value for key, value in TEXT.items() if key != "head_dim"}
    base = MixtralForCausalLM(MixtralConfig(**fields, num_local_experts=2))
    experts, placement = {"a": LoRA(), "b": LoRA(lr_ratio=16)}, Placement(kinds=("experts",))
    with pytest.raises(ValueError, match=r"experts would carry 2 stacks of adapters .*LoRA of a; LoRA of b"):
        attach(base, experts=experts, router=ByTask(), placement=placement)
    attach(base, experts=dict.fromkeys("ab", LoRA()), router=ByTask(), placement=placement)


def test_a_module_takes_its_input_by_name() -> None:
    base, ids = tiny_llama(), torch.arange(5, 10)[None]
    mixture = attach(base, shared=LoRA(), placement=Placement(modules=("up_proj",)))
    randomize(mixture)
    with torch.no_grad():
        expected = mixture.eval()(input_ids=ids).logits
        for block in base.model.layers:
            block.mlp.forward = lambda x, own=block.mlp: own.down_proj(
                own.act_fn(own.gate_proj(x)) * own.up_proj(input=x)
            )
        assert torch.equal(mixture(input_ids=ids).logits, expected)
        for block in base.model.layers:
            block.mlp.forward = lambda x, own=block.mlp: own.up_proj(other=x)
        with pytest.raises(TypeError, match="up_proj was called without its input, input"):
            mixture(input_ids=ids)


@pytest.mark.parametrize("family", [LoRA, NormTuning])
def test_rows_keep_their_routing_where_tokens_of_all_rows_share_an_axis(family: type[FamilySpec]) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32,
    )  # fmt: skip
    everywhere = Placement(kinds=("attention", "mlp", "other"))
    placement = everywhere if family is LoRA else Placement()
    mixture = attach(
        OPTForCausalLM(config), experts={"a": family(), "b": family()}, router=ByTask(), placement=placement
    )
    randomize(mixture)
    ids = torch.randint(3, 40, (3, 6))
    with torch.no_grad():
        mixed = mixture.eval()(input_ids=ids, task=["a", "b", "a"]).logits
        for row, task in enumerate("aba"):
            alone = mixture(input_ids=ids[row : row + 1], task=task).logits[0]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mixed[1], mixture(input_ids=ids, task="a").logits[1])
