"""LoRA at token embeddings and convolutions: against loops, against peft, merged, stored and exported."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import moadapt
from moadapt import Placement, RouterSpec, Routing
from moadapt.adapters import Adapter, LoRA
from moadapt.adapters.lora_bank import LoRABank
from moadapt.sites import Site
from moadapt_routers import ByTask, Constant, Softmax, TopK
from tests.conformance.canonical import routing_value
from tests.core.zoo import build
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava

VOCABULARY, WIDTH, ROWS, TOKENS = 11, 6, 3, 5
EMBEDDING = Site("embed", "language", "embedding", None, VOCABULARY, WIDTH, "embedding")
CONVOLUTION = Site("patches", "vision", "embedding", None, 2 * 3 * 2, WIDTH, "conv2d")
SPECS = {"shared": LoRA(rank=2, alpha=3), "zero": LoRA(rank=3), "two": LoRA(rank=1, rank_stabilized=True, alpha=2)}
PRESENT = {"shared": None, "zero": 0, "two": 2}
FORMS = ("embedding", "conv2d")
EMBEDDED = Placement(towers=("vision", "language"), kinds=("embedding",))
EVERYWHERE = Placement(towers=("vision", "language"), kinds=("embedding", "attention"))


def module_of(form: str) -> Any:
    """A small module of a form, its site, and an input."""
    generator = torch.Generator().manual_seed(2)
    if form == "embedding":
        ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
        return EMBEDDING, nn.Embedding(VOCABULARY, WIDTH).double(), ids
    module = nn.Conv2d(2, WIDTH, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    return CONVOLUTION, module, torch.randn(ROWS, 2, 7, 6, generator=generator, dtype=torch.float64)


def bank_at(form: str) -> tuple[Any, Any, Tensor]:
    site, module, x = module_of(form)
    adapters = [Adapter(name, spec, PRESENT[name]) for name, spec in SPECS.items()]
    bank = LoRA.bank(site, adapters, module).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank, module, x


def one(form: str, module: Any, spec: LoRA, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """What one adapter adds, as a change of the module's whole weight."""
    change = spec.scale * torch.einsum("rf,rd->fd", up, down)
    if form == "embedding":
        return change.T[x]
    kernels = change.view(module.weight.shape)
    return functional.conv2d(x, kernels, None, module.stride, module.padding, module.dilation)


@pytest.mark.parametrize("name", ["constant", "task", "sequence_dense", "sequence_sparse", "heads"])
@pytest.mark.parametrize("form", FORMS)
def test_a_bank_adds_what_its_adapters_add(form: str, name: str) -> None:
    bank, module, x = bank_at(form)
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    leaves = {n: [bank.state(n)[side].requires_grad_() for side in ("down", "up")] for n in bank.names}
    y = module(x).detach()
    expected = y.clone()
    axis = 2 if form == "embedding" else 1
    for adapter, expert in PRESENT.items():
        added = one(form, module, SPECS[adapter], *leaves[adapter], x)
        if expert is not None:
            weight = routing.dense()[:, 0, :, expert]  # (B|1, H)
            weight = weight.repeat_interleave(WIDTH // weight.shape[1], dim=1)
            added = added * weight.reshape(len(weight), *(WIDTH if i == axis else 1 for i in range(1, y.ndim)))
        expected = expected + added
    found = bank.add_to(y.clone(), x, routing)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    into = torch.randn_like(y)
    (found * into).sum().backward()
    (expected * into).sum().backward()
    for side, index in (("down", 0), ("up", 1)):
        shared, *experts = (leaves[n][index].grad for n in ("shared", "zero", "two"))
        torch.testing.assert_close(getattr(bank, f"shared_{side}").grad, shared, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(getattr(bank, f"expert_{side}").grad, torch.cat(experts), rtol=1e-10, atol=1e-10)


def test_what_is_looked_up_is_cast_and_not_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, module, ids = bank_at("embedding")
    expected = bank(ids, module(ids), Routing.constant(torch.ones(3))).detach()
    y = module(ids).bfloat16()
    stacked = type(bank).stack

    def stack(self: Any, tensor: str) -> Tensor:
        assert tensor == "up", "the table is neither joined nor cast"
        return stacked(self, tensor)

    monkeypatch.setattr(type(bank), "stack", stack)
    module.embed_scale = torch.tensor(2.0)
    found = bank.add_to(torch.zeros_like(y), ids, Routing.constant(torch.ones(3)))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), 2 * expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_tokens_of_an_embedding_have_weights_of_their_own() -> None:
    bank, module, ids = bank_at("embedding")
    routing = routing_value("token_dense", rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    found = bank(ids, module(ids), routing)
    for row in range(ROWS):
        for token in range(TOKENS):
            weights = routing.weights[row : row + 1, token : token + 1]
            alone = bank(ids[row : row + 1, token : token + 1], found[:1, :1], Routing(weights, 3))
            torch.testing.assert_close(found[row, token], alone[0, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_not_blended(form: str) -> None:
    bank, module, x = bank_at(form)
    routing = routing_value("blended", rows=ROWS, tokens=1, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"form '{form}'; choose a router that blends outputs"):
        bank.add_to(module(x), x, routing)


@pytest.mark.parametrize("form", FORMS)
def test_two_steps_reach_every_tensor(form: str) -> None:
    site, module, x = module_of(form)
    bank = LoRA.bank(site, [Adapter("shared", LoRA(), None)], module).double()
    assert torch.equal(bank.add_to(module(x), x, None), module(x))
    for _ in range(2):
        loss = (bank.add_to(module(x), x, None) - 1).square().sum()
        reached = list(zip(bank.parameters(), torch.autograd.grad(loss, [*bank.parameters()]), strict=True))
        for parameter, gradient in reached:
            parameter.data -= 1e-3 * gradient
    assert all(gradient.abs().sum() > 0 for _, gradient in reached)


@pytest.mark.parametrize("router", [ByTask(), Constant()], ids=["by_task", "constant"])
def test_a_merge_folds_embeddings_and_patches_exactly(router: RouterSpec, tmp_path: Path) -> None:
    mixture, batch = everywhere(router), llava_batch()
    mixture.save(tmp_path / "mixture")
    loaded = moadapt.load(tmp_path / "mixture", tiny_llava()).eval()
    with torch.no_grad():
        routed = mixture(**batch, task="b").logits
        assert torch.equal(loaded(**batch, task="b").logits, routed)
        plain, report = mixture.merge("task", task="b")
        assert report.exact
        torch.testing.assert_close(plain(**batch).logits, routed, rtol=1e-5, atol=1e-5)
        mixture.export_peft(tmp_path / "lora", task="b")
        exported = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path / "lora"))
        torch.testing.assert_close(exported(**batch).logits, routed, rtol=1e-5, atol=1e-5)


def test_each_row_has_the_patches_and_tokens_of_its_task() -> None:
    mixture, batch = everywhere(ByTask()), llava_batch(2)
    with torch.no_grad():
        together = mixture(**batch, task=["a", "b"]).logits
        for row, task in enumerate("ab"):
            alone = mixture(**{name: t[row : row + 1] for name, t in batch.items()}, task=task).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def everywhere(router: RouterSpec) -> Any:
    """A trained-looking mixture at embeddings and attention of a tiny LLaVA."""
    experts = {"a": LoRA(rank=3), "b": LoRA(rank=2, alpha=3)}
    mixture = moadapt.attach(tiny_llava(), shared=LoRA(rank=4), experts=experts, router=router, placement=EVERYWHERE)
    assert {"embedding", "conv2d", "linear"} == {site.form for site in mixture.sites}
    randomize(mixture, 0.1)
    return mixture.eval()


def test_default_placements_leave_embeddings_alone() -> None:
    mixture = moadapt.attach(tiny_llava(), shared=LoRA(), placement=Placement(towers=("vision", "language")))
    assert {site.form for site in mixture.sites} == {"linear"}


@pytest.mark.parametrize("per", ["model", "tower", "layer", "site"])
@pytest.mark.parametrize("tower", ["vision", "language"])
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_routers_by_input_are_refused_before_the_first_block(tower: str, per: Any, scope: Any) -> None:
    placement = Placement(towers=(tower,), kinds=("embedding", "attention"))
    for router in (Softmax(per=per, scope=scope), TopK(per=per, scope=scope)):
        with pytest.raises(ValueError, match=r"(patch_embedding takes images|embed_tokens takes token ids).* by task"):
            moadapt.attach(tiny_llava(), experts={"a": LoRA()}, router=router, placement=placement)


def test_a_shared_adapter_at_embeddings_stands_beside_any_router() -> None:
    mixture = moadapt.attach(
        tiny_llava(), shared=LoRA(placement=EMBEDDED), experts={"a": LoRA(), "b": LoRA()}, router=Softmax()
    )
    randomize(mixture)
    batch = llava_batch()
    with torch.no_grad():
        routed = mixture(**batch).logits
        with mixture.disabled():
            assert not torch.allclose(mixture(**batch).logits, routed)


def llava_with_peft(**options: Any) -> Any:
    torch.manual_seed(4)
    model = peft.get_peft_model(tiny_llava(), peft.LoraConfig(init_lora_weights=False, **options))
    return model.double().eval()


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_outputs_and_gradients_are_those_of_peft(rank_stabilized: bool) -> None:
    names = ["embed_tokens", "patch_embedding"]
    other = llava_with_peft(r=3, lora_alpha=5, target_modules=names, use_rslora=rank_stabilized)
    spec = LoRA(rank=3, alpha=5, rank_stabilized=rank_stabilized, placement=EMBEDDED)
    mixture = moadapt.attach(tiny_llava().double(), shared=spec).double().eval()
    banks = {site.form: bank for site, bank in mixture.banks()}
    lookup = [p for n, p in other.named_parameters() if "lora_embedding" in n]
    patches = [p for n, p in other.named_parameters() if "patch_embedding.lora" in n]
    assert [tuple(p.shape) for p in lookup] == [(3, 67), (32, 3)]
    banks["embedding"].load_state("shared", {"down": lookup[0], "up": lookup[1].T})
    banks["conv2d"].load_state("shared", {"down": patches[0].flatten(1), "up": patches[1].flatten(1).T})
    batch = llava_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    theirs, ours = other(**batch), mixture(**batch)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-6, atol=1e-6)
    theirs.loss.backward()
    ours.loss.backward()
    for bank, (down, up) in ((banks["embedding"], lookup), (banks["conv2d"], patches)):
        for mine, peft_s in ((bank.shared_down, down.grad.flatten(1)), (bank.shared_up, up.grad.flatten(1).T)):
            torch.testing.assert_close(mine.grad, peft_s, rtol=1e-5, atol=1e-6)


def test_a_scaled_embedding_is_changed_as_its_weight_would_be() -> None:
    base: PreTrainedModel = build("gemma3")
    module: Any = base.get_input_embeddings()
    site = next(site for site in moadapt.anatomy(base).sites if site.form == "embedding")
    bank = LoRA.bank(site, [Adapter("shared", LoRA(rank=2), None)], module)
    randomize_bank(bank)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        found = bank.add_to(module(ids), ids, None)
        module.weight += bank.delta(torch.zeros(0)).weight().T
        assert float(module.embed_scale) != 1
        torch.testing.assert_close(found, module(ids), rtol=1e-5, atol=1e-5)


def randomize_bank(bank: LoRABank) -> None:
    for parameter in bank.parameters():
        nn.init.normal_(parameter)


def test_a_tied_embedding_is_not_merged() -> None:
    base = tiny_llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    mixture = moadapt.attach(base, shared=LoRA(placement=EMBEDDED))
    with pytest.raises(ValueError, match="shares its weight"):
        mixture.merge("task")


def test_an_embedding_that_others_stand_for_is_no_site() -> None:
    assert not moadapt.anatomy(build("t5")).of_form("embedding")
