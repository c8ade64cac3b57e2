"""Soft slots against their equations, and where they may sit: nowhere that a token must not read a later one."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertLMHeadModel, BertModel

from moadapt import Mixture, Placement, anatomy, attach
from moadapt.adapters import NotMergeable, SoftSlots
from moadapt.adapters.bank import Adapter
from moadapt.adapters.soft_slots import SoftSlotsBank
from moadapt.call import Call
from moadapt.sites import Site
from moadapt_routers import ByTask
from tests.conformance.canonical import routing_value
from tests.core.zoo import TEXT, ZOO, batch_of, build
from tests.models import PATCHES, llava_batch, randomize, tiny_llama, tiny_llava

ROWS, TOKENS, WIDTH = 3, 5, 8
SITE = Site("blocks.0.mlp", "language", "mlp", 0, WIDTH, WIDTH, "sublayer")
SPECS = {
    "shared": SoftSlots(slots=2, width=3),
    "one": SoftSlots(slots=1, width=2),
    "three": SoftSlots(slots=3, width=5, bottlenecks=2),
    "wide": SoftSlots(slots=2, width=4, bottlenecks=3),
}
READS = {"bert", "vit", "dinov2"}
ENCODES = {"t5", "florence2"}


def build_bank(specs: dict[str, SoftSlots] = SPECS) -> SoftSlotsBank:
    """A float64 bank of random weights."""
    torch.manual_seed(0)
    experts = [name for name in specs if name != "shared"]
    adapters = [Adapter(n, spec, experts.index(n) if n in experts else None) for n, spec in specs.items()]
    bank = SoftSlotsBank(SITE, adapters, nn.Linear(WIDTH, WIDTH)).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


def added(bank: SoftSlotsBank, name: str, x: Tensor) -> Tensor:
    """What one adapter adds to one row (T, d), slot by slot."""
    one, spec = bank.state(name), SPECS[name]
    products = x @ one["slots"].T
    combine, worked = products.softmax(dim=1), []
    for index in range(len(one["slots"])):
        mixed = products[:, index].softmax(dim=0) @ x
        mine = index // spec.slots
        rows = slice(mine * spec.width, (mine + 1) * spec.width)
        middle = functional.gelu(one["down"][rows] @ mixed + one["down_bias"][rows])
        worked.append(middle @ one["up"][rows] + one["up_bias"][mine])
    return combine @ torch.stack(worked)


def values() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, ROWS, TOKENS, WIDTH, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("name", ["constant", "task", "sequence_sparse", "token_dense", "heads"])
def test_a_bank_follows_the_equations_slot_by_slot(name: str) -> None:
    bank, (x, y) = build_bank(), values()
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    expected = torch.stack([added(bank, "shared", row) for row in x])
    for expert, each in enumerate(("one", "three", "wide")):
        weights = routing.dense()[..., expert]
        weights = weights.repeat_interleave(WIDTH // weights.shape[2], dim=2)
        expected = expected + weights * torch.stack([added(bank, each, row) for row in x])
    torch.testing.assert_close(bank(x, y, routing), expected, rtol=1e-10, atol=1e-10)


def test_one_slot_and_an_identity_give_every_token_the_weighted_mean() -> None:
    bank = build_bank({"shared": SoftSlots(slots=1, width=WIDTH, activation="identity")})
    one, zeros = torch.eye(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    slot = torch.randn(1, WIDTH, dtype=torch.float64)
    bank.load_state("shared", {"slots": slot, "down": one, "up": one, "down_bias": zeros, "up_bias": zeros[None]})
    x, y = values()
    mean = ((x @ slot[0]).softmax(dim=1).unsqueeze(-1) * x).sum(dim=1, keepdim=True)
    torch.testing.assert_close(bank(x, y, None), mean.expand_as(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_mixed_in(side: str) -> None:
    bank, (x, y) = build_bank({"shared": SPECS["shared"]}), values()
    padding, real = 100 * torch.randn(ROWS, 2, WIDTH, dtype=torch.float64), torch.ones(ROWS, TOKENS + 2).bool()
    own = slice(2, None) if side == "left" else slice(0, TOKENS)
    longer = torch.cat([padding, x] if side == "left" else [x, padding], dim=1)
    real[:, :2] &= side == "right"
    real[:, TOKENS:] &= side == "left"
    found = bank(longer, longer, None, Call(ROWS, real=real))
    torch.testing.assert_close(found[:, own], bank(x, y, None), rtol=1e-10, atol=1e-10)


def test_a_row_of_padding_takes_nothing_and_stays_finite() -> None:
    bank, (x, y) = build_bank({"shared": SPECS["shared"]}), values()
    real = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    real[1] = False
    found = bank(x.requires_grad_(), y, None, Call(ROWS, real=real))
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    mixed = {row: float(x.grad[row].abs().sum()) for row in range(ROWS)}
    assert mixed[0] > 0
    assert found.isfinite().all()


def test_rows_in_one_axis_are_refused() -> None:
    bank, x = build_bank({"shared": SPECS["shared"]}), torch.randn(7, WIDTH, dtype=torch.float64)
    bank(x, x, None, Call(1))
    for packed in (x, x.unsqueeze(0)):
        with pytest.raises(ValueError, match=r"blocks\.0\.mlp gets one axis of tokens for 3 rows.*one by one"):
            bank(packed, packed, None, Call(3))


def test_its_size_is_the_closed_form() -> None:
    for spec in SPECS.values():
        bank = build_bank({"shared": spec})
        each = (spec.slots + 2 * spec.width + 1) * WIDTH + spec.width
        assert sum(p.numel() for p in bank.parameters()) == spec.bottlenecks * each


def test_it_cannot_be_merged_and_says_why() -> None:
    with pytest.raises(NotMergeable, match=r"blocks\.0\.mlp: .* read from other tokens"):
        build_bank().delta(torch.ones(3))


def later_tokens_show(mixture: Mixture, **fixed: Any) -> bool:
    """Whether the second half of a text changes what comes out of the first."""
    ids = torch.arange(5, 13).expand(2, -1)
    with torch.no_grad():
        outputs = [mixture(input_ids=each, **fixed)[0] for each in (ids, torch.cat([ids[:, :4], ids[:, 4:] + 20], 1))]
    return bool((outputs[0] - outputs[1])[:, :4].abs().max() > 1e-3)


@dataclass(frozen=True, kw_only=True)
class Misdeclared(SoftSlots):
    """Soft slots that claim to suit decoders."""

    causal: ClassVar[bool] = True


def test_on_a_decoder_it_would_leak_and_is_refused() -> None:
    leaking = attach(tiny_llama(), shared=Misdeclared()).eval()
    assert not later_tokens_show(leaking, use_cache=False)
    randomize(leaking)
    assert later_tokens_show(leaking, use_cache=False)
    with pytest.raises(ValueError, match=r"at none of the 6 sites .* model\.layers\.0\.\w+: attention is causal there"):
        attach(tiny_llama(), shared=SoftSlots())


def test_of_both_towers_it_takes_the_one_without_a_causal_mask() -> None:
    mixture = attach(tiny_llava(), shared=SoftSlots(), placement=Placement.named("all"))
    assert {site.tower for site in mixture.sites} == {"vision"}
    with pytest.raises(ValueError, match=r"read later ones through SoftSlots; place it .*towers=\('vision',\)"):
        attach(tiny_llava(), shared=SoftSlots())


@pytest.mark.parametrize("name", sorted(ZOO.keys() - READS - ENCODES))
def test_no_tower_that_writes_text_takes_it(name: str) -> None:
    """PaliGemma's attention says that it is not causal, as it reads prompts both ways; its answers are causal."""
    sites = anatomy(build(name)).of_form("sublayer")
    assert {site.causal for site in sites if site.tower == "language"} == {True}
    assert {site.causal for site in sites if site.tower == "vision"} <= {False}


@pytest.mark.parametrize("name", sorted(READS))
def test_it_sits_anywhere_in_what_only_reads(name: str) -> None:
    assert {site.causal for site in anatomy(build(name)).of_form("sublayer")} == {False}


@pytest.mark.parametrize("name", sorted(ENCODES))
def test_it_sits_in_encoders_and_not_in_their_decoders(name: str) -> None:
    sites = [site for site in anatomy(build(name)).of_form("sublayer") if site.tower == "language"]
    assert {(site.layer, site.causal) for site in sites} == {(0, False), (1, False), (2, True), (3, True)}


def bert(kind: Any = BertModel, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {name: TEXT[name] for name in TEXT if name not in ("num_key_value_heads", "head_dim")}
    return kind(BertConfig(**sizes, **fields)).eval()


def test_on_an_encoder_tokens_read_each_other_but_no_padding_and_no_other_row() -> None:
    mixture = attach(bert(), experts={"a": SoftSlots(), "b": SoftSlots(slots=2, bottlenecks=2)}, router=ByTask())
    randomize(mixture)
    mixture.double().eval()
    with mixture.disabled():
        before = mixture(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
    ids = torch.tensor([[5, 6, 7, 9, 9], [5, 6, 7, 8, 10], [11, 12, 13, 14, 15]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    together = mixture(input_ids=ids, attention_mask=mask, task=["a", "b", "a"]).last_hidden_state
    for row, task in enumerate("aba"):
        real = int(mask[row].sum())
        alone = mixture(input_ids=ids[row : row + 1, :real], task=task).last_hidden_state
        torch.testing.assert_close(together[row, :real], alone[0], rtol=1e-10, atol=1e-10)
        if row == 0:
            assert (alone - before).abs().max() > 1e-3


def test_a_bert_that_decodes_is_refused() -> None:
    with pytest.raises(ValueError, match="attention is causal there"):
        attach(bert(BertLMHeadModel, is_decoder=True), shared=SoftSlots())


def test_images_of_a_batch_do_not_meet() -> None:
    where = Placement(towers=("vision",))
    experts = {name: SoftSlots(slots=2) for name in ("ask", "tell", "find")}
    mixture, batch = attach(tiny_llava(), experts=experts, router=ByTask(), placement=where), llava_batch()
    randomize(mixture)
    mixture.eval()
    seen: list[Tensor] = []
    mixture.base.model.multi_modal_projector.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        mixture(**batch, task=["ask", "tell", "find"])
        for row, task in enumerate(("ask", "tell", "find")):
            mixture(**{name: tensor[row : row + 1] for name, tensor in batch.items()}, task=task)
    assert seen[0].shape[:2] == (3, PATCHES)
    torch.testing.assert_close(seen[0], torch.cat(seen[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava_pixtral", "qwen2_5_vl"])
def test_images_that_are_packed_into_one_row_are_taken_alone(name: str) -> None:
    batch = batch_of(name) | ({"image_sizes": torch.tensor([[16, 16]] * 2)} if name == "llava_pixtral" else {})
    mixture = attach(build(name), shared=SoftSlots(), placement=Placement(towers=("vision",)))
    with pytest.raises(ValueError, match=r"gets one axis of tokens for 2 rows"):
        mixture(**batch)
    half = {n: t[: len(t) // 2] for n, t in batch.items()}
    assert mixture(**half).logits.isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"slots": 0}, {"width": 0}, {"bottlenecks": 0}, {"activation": "sign"}], ids=lambda w: next(iter(w))
)
def test_bad_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"SoftSlots got .*need numbers of 1 or more and one of gelu, relu"):
        SoftSlots(**wrong)
