"""Prefixes against the formula, head by head and token by token, and what they do to the attention they join."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from moadapt import Mixture, Placement, Routing, attach
from moadapt.adapters import Bottleneck, NotMergeable, Prefix
from moadapt.adapters.bank import Adapter
from moadapt.adapters.prefix import PrefixBank
from moadapt.call import Call
from moadapt.sites import anatomy
from moadapt_routers import ByTask, Constant, Softmax
from tests.conformance.canonical import EVERYWHERE, EXPERTS, TASKS, Given, routing_value
from tests.core.zoo import batch_of, build
from tests.models import (
    IMAGE_TOKEN,
    llava_batch,
    padded,
    prompt_of,
    ragged_prompts,
    randomize,
    tiny_llama,
    tiny_llava,
)

ROWS, TOKENS = 3, 6
LENGTHS = {"shared": 3, "a": 2, "b": 5, "c": 1}
KERNELS = pytest.mark.parametrize("kernel", ["eager", "sdpa"])
APART = Prefix(length=3, image_length=2)
LANGUAGE_SITE, VISION_SITE = "model.language_model.layers.1.self_attn", "model.vision_tower.encoder.layers.1.self_attn"


def bank_at(base: Any, path: str, image: int | None = None, *, fresh: bool = False) -> tuple[PrefixBank, Any]:
    """A float64 bank of four prefixes of different lengths at an attention, and that attention."""
    site = next(site for site in anatomy(base).sites if site.path == path)
    names = list(LENGTHS)
    adapters = [
        Adapter(n, Prefix(length=k, image_length=None if image is None else image + i), None if i == 0 else i - 1)
        for i, (n, k) in enumerate(LENGTHS.items())
    ]
    assert names[0] == "shared"
    bank = Prefix.bank(site, adapters, base.get_submodule(path)).double()
    for parameter in bank.parameters() if not fresh else ():
        nn.init.normal_(parameter)
    return bank, base.get_submodule(path)


def inputs_of(attention: nn.Module, rows: int = ROWS, tokens: int = TOKENS) -> tuple[Tensor, dict[str, Any]]:
    """Input of an attention, and what else it takes."""
    width = attention.q_proj.in_features  # type: ignore[union-attr]
    x = torch.randn(rows, tokens, width, dtype=torch.float64, requires_grad=True)  # type: ignore[arg-type]
    angles = torch.randn(1, tokens, 8, dtype=torch.float64)
    rotary = {"position_embeddings": (angles.cos(), angles.sin())}
    return x, {"attention_mask": None} | (rotary if hasattr(attention, "num_key_value_groups") else {})


def naive(attention: Any, leaves: Any, x: Tensor, kwargs: Any, routing: Routing, image: Tensor | None) -> Tensor:
    """The base's attention plus what every head of every token reads from every prefix."""
    d, scaling = attention.head_dim, attention.head_dim**-0.5
    query = attention.q_proj(x).unflatten(-1, (-1, d)).transpose(1, 2)
    if "position_embeddings" in kwargs:
        query = apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])[0]
    groups, added = getattr(attention, "num_key_value_groups", 1), torch.zeros_like(query)
    added = [[[query.new_zeros(d) for _ in range(x.shape[1])] for _ in range(query.shape[1])] for _ in range(len(x))]
    for i, state in enumerate(leaves.values()):
        for b in range(len(x)):
            for t in range(x.shape[1]):
                kind = "all" if image is None else "image" if image[b, t] else "text"
                weights = routing.dense().expand(len(x), x.shape[1], 1, -1)[b, t, 0]
                weight = 1.0 if i == 0 else weights[i - 1]
                for h in range(query.shape[1]):
                    keys, values = (state[f"{kind}_{part}"][:, h // groups] for part in ("keys", "values"))
                    shares = (keys @ query[b, h, t] * scaling).softmax(-1)
                    added[b][h][t] = added[b][h][t] + weight * state[f"{kind}_gates"][0, h].tanh() * (shares @ values)
    read = torch.stack([torch.stack([torch.stack(each) for each in row]) for row in added])  # (B, H, T, d)
    project = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    return attention(x, **kwargs)[0] + read.transpose(1, 2).flatten(2) @ project.weight.T


@KERNELS
@pytest.mark.parametrize("name", ["constant", "sequence_sparse", "token_dense"])
@pytest.mark.parametrize("image_length", [None, 2])
@pytest.mark.parametrize("path", [LANGUAGE_SITE, VISION_SITE], ids=["language", "vision"])
def test_a_bank_equals_the_loop(path: str, image_length: int | None, name: str, kernel: str) -> None:
    base = tiny_llava().double().requires_grad_(False)
    base.set_attn_implementation(kernel)
    bank, attention = bank_at(base, path, image_length)
    x, kwargs = inputs_of(attention)
    routing = routing_value(name, rows=ROWS, tokens=TOKENS, dtype=torch.float64)
    routing.weights.requires_grad_()
    leaves = {n: {key: t.requires_grad_() for key, t in bank.state(n).items()} for n in LENGTHS}
    image = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    image[0, 1:3] = image[1, :4] = True
    told = None if image_length is None else image if path is LANGUAGE_SITE else torch.ones_like(image)
    expected = naive(attention, leaves, x, kwargs, routing, told)
    found = bank.adapt(attention, x, routing, Call(ROWS, image=image), **kwargs)[0]
    assert_close(found, expected)
    into, named = torch.randn_like(found), dict(bank.named_parameters())
    ours = torch.autograd.grad(found, (x, routing.weights, *named.values()), into)
    flat = [t for state in leaves.values() for t in state.values()]
    theirs = torch.autograd.grad(expected, (x, routing.weights, *flat), into)
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])
    by_key = {key: theirs[2 + i :: len(bank.tensors)] for i, key in enumerate(bank.tensors)}
    for gradient, parameter in zip(ours[2:], named, strict=True):
        part, key = parameter.split("_", 1)
        assert_close(gradient, by_key[key][0] if part == "shared" else torch.cat(by_key[key][1:]))


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_rows_do_not_meet(rows: int) -> None:
    """Also where there are as many rows as a prefix has."""
    bank, attention = bank_at(tiny_llava().double(), LANGUAGE_SITE)
    x, kwargs = inputs_of(attention, rows)
    routing = routing_value("task", rows=rows, tokens=TOKENS, dtype=torch.float64)
    found = bank.adapt(attention, x, routing, None, **kwargs)[0]
    for row in range(rows):
        alone = bank.adapt(attention, x[row : row + 1], Routing.of_rows(torch.tensor([row % 3]), 3), None, **kwargs)[0]
        assert_close(alone[0], found[row])


def test_only_gates_learn_at_first_and_everything_after() -> None:
    experts = {name: APART for name in EXPERTS}
    read = Placement(depth=(0, 0.6))  # of what the last block gives at image tokens nothing is read
    mixture = attach(tiny_llava(), shared=APART, experts=experts, router=ByTask(), placement=read).train()
    named = dict(mixture.named_adapter_parameters())
    optimizer = torch.optim.SGD(named.values(), lr=1.0)
    for is_first in (True, False):
        optimizer.zero_grad()
        mixture(**llava_batch(), task=TASKS).loss.backward()
        for name, parameter in named.items():
            assert bool(parameter.grad.any()) is (not is_first or name.endswith("gates")), (name, is_first)  # type: ignore[union-attr]
        optimizer.step()


def test_its_size_is_the_closed_form() -> None:
    """Two tensors of n rows for each of 2 heads of keys and values with 8 numbers, and 4 gates."""
    mixture = attach(tiny_llava(), shared=Prefix(length=5))
    assert sum(p.numel() for _, p in mixture.named_adapter_parameters()) == 3 * (2 * 5 * 2 * 8 + 4)
    mixture = attach(tiny_llava(), shared=Prefix(length=5, image_length=3))
    assert sum(p.numel() for _, p in mixture.named_adapter_parameters()) == 3 * (2 * 8 * 2 * 8 + 8)


def test_image_and_text_prefixes_serve_their_own_tokens() -> None:
    base, batch = tiny_llava(), llava_batch()
    mixture = attach(base, shared=APART, placement=Placement(kinds=("attention",), depth=(0.6, 1)))
    randomize(mixture)
    (_, bank), *_ = mixture.banks()
    seen: list[Tensor] = []
    base.get_submodule(next(iter(mixture.sites)).path).register_forward_hook(lambda m, args, out: seen.append(out[0]))
    with torch.no_grad():
        mixture(**batch)
        for kind in ("text", "image"):
            values = bank.get_parameter(f"shared_{kind}_values")
            values.add_(1.0)
            mixture(**batch)
            values.sub_(1.0)
    image = batch["input_ids"] == IMAGE_TOKEN
    changed = [(each - seen[0]).abs().amax(dim=-1) > 1e-4 for each in seen[1:]]
    assert torch.equal(changed[0], ~image)
    assert torch.equal(changed[1], image)


def test_zero_rows_leave_their_tokens_alone() -> None:
    batch, image = llava_batch(), llava_batch()["input_ids"] == IMAGE_TOKEN
    for spec, is_served in ((Prefix(length=3, image_length=0), ~image), (Prefix(length=0, image_length=3), image)):
        base = tiny_llava()
        mixture = attach(base, shared=spec, placement=Placement(depth=(0, 0.3)))
        randomize(mixture)
        found, plain = outputs_of_the_site(mixture, batch)
        assert torch.equal((found - plain).abs().amax(dim=-1) > 1e-4, is_served)


@KERNELS
def test_generation_is_the_same_with_every_cache(kernel: str) -> None:
    base = tiny_llava()
    base.set_attn_implementation(kernel)
    mixture = attach(base, shared=APART, experts={n: APART for n in EXPERTS}, router=Softmax())
    randomize(mixture)
    prompt = ragged_prompts()
    how = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    for beams in (1, 2):
        expected = mixture.generate(**prompt, **how, num_beams=beams, use_cache=False)
        assert torch.equal(mixture.generate(**prompt, **how, num_beams=beams), expected)
        assert torch.equal(mixture.generate(**prompt, **how, num_beams=beams, cache_implementation="static"), expected)
    with torch.no_grad(), mixture.disabled():
        assert not torch.equal(mixture.generate(**prompt, **how, num_beams=2), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    mixture = attach(tiny_llava(), shared=APART, experts={n: APART for n in EXPERTS}, router=Softmax())
    randomize(mixture)
    batch = prompt_of(llava_batch())
    wide = padded(batch, 3, side)
    positions = (wide["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        found, expected = mixture(**wide, position_ids=positions).logits, mixture(**batch).logits
    found = found[:, 3:] if side == "left" else found[:, :-3]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_stays_on_the_base() -> None:
    base = tiny_llava()
    attributes = {path: dict(vars(module)) for path, module in base.named_modules()}
    with torch.no_grad():
        plain = base(**llava_batch()).logits
        mixture = attach(base, shared=Prefix(), placement=EVERYWHERE)
        randomize(mixture)
        assert not torch.equal(mixture(**llava_batch()).logits, plain)
        assert mixture.detach() is base
        for path, module in base.named_modules():
            assert getattr(module, "config", None) is attributes[path].get("config"), path
        assert torch.equal(base(**llava_batch()).logits, plain)


def test_a_failure_within_attention_leaves_its_config() -> None:
    base = tiny_llava()
    mixture = attach(base, shared=Prefix())
    attention = base.get_submodule(LANGUAGE_SITE).module
    own = attention.config
    handle = attention.o_proj.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        mixture(**llava_batch())
    handle.remove()
    assert attention.config is own
    assert mixture.context.call is None
    assert mixture(**llava_batch()).logits.isfinite().all()


def test_a_copy_works_by_itself() -> None:
    mixture = attach(tiny_llava(), shared=Prefix())
    randomize(mixture)
    other: Mixture = copy.deepcopy(mixture)
    with torch.no_grad():
        expected = mixture(**llava_batch()).logits
        for parameter in mixture.parameters():
            parameter.zero_()
        assert torch.equal(other(**llava_batch()).logits, expected)
    assert other.base.get_submodule(LANGUAGE_SITE).module.config is other.base.model.language_model.config


def test_it_shares_a_site_with_another_family() -> None:
    """The other one reads what the attention gives with its prefixes."""
    base, batch = tiny_llava(), llava_batch()
    placement = Placement(kinds=("attention",), depth=(0, 0.3))
    specs = {"a": Prefix(length=2), "b": Bottleneck(width=3)}
    mixture = attach(base, experts=specs, router=Constant(weights=(0.7, 0.3)), placement=placement)
    randomize(mixture)
    (site,), (first, second) = mixture.sites, [bank for _, bank in mixture.banks()]
    seen: dict[str, Any] = {}
    wrapper = base.get_submodule(site.path)
    wrapper.register_forward_hook(lambda m, args, kw, out: seen.update(kw=kw, out=out[0]), with_kwargs=True)
    routing = Routing.constant(torch.tensor([0.7, 0.3]))
    with torch.no_grad():
        mixture(**batch, use_cache=False)
        x = seen["kw"].pop("hidden_states")
        y = first.adapt(wrapper.module, x, routing, Call(3), **seen["kw"])[0]
        assert torch.allclose(seen["out"], y + second(x, y, routing), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "vit", "t5", "qwen2_5_vl", "mllama", "gemma3", "florence2"])
def test_it_joins_the_attention_of_many_bases(name: str) -> None:
    base = build(name)
    rows: dict[str, Any] = {"input_ids": torch.arange(5, 13).view(2, 4)}
    if name == "vit":
        rows = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if base.config.is_encoder_decoder:
        rows["decoder_input_ids"] = torch.arange(5, 9).view(2, 2)
    with torch.no_grad():
        plain = base(**rows).logits
        mixture = attach(base, shared=Prefix(length=2), experts={"a": Prefix(length=3)}, router=ByTask())
        assert torch.equal(mixture(**rows, task="a").logits, plain)
        randomize(mixture, scale=1.0)
        assert ((mixture(**rows, task="a").logits - plain).flatten(1).abs().amax(dim=1) > 1e-5).all()
        assert torch.equal(mixture.detach()(**rows).logits, plain)


def test_packed_patches_read_the_prefixes() -> None:
    """Qwen2.5-VL gives a block all images without an axis of rows, and its attention one image at a time."""
    base = build("qwen2_5_vl").double()
    vision = base.model.visual
    batch = {name: t.double() if t.is_floating_point() else t for name, t in batch_of("qwen2_5_vl").items()}
    placement = Placement(towers=("vision",), kinds=("attention",))
    mixture = attach(
        base, experts={"a": Prefix(length=2), "b": Prefix(length=3)}, router=Constant(), placement=placement
    )
    mixture.double()
    randomize(mixture, scale=1.0)
    with torch.no_grad():
        seen: list[Tensor] = []
        vision.register_forward_hook(lambda m, args, out: seen.append(out.pooler_output))
        mixture(**batch)
        mixture(**{**batch, "pixel_values": batch["pixel_values"].roll(4, dims=0)})
        with mixture.disabled():
            mixture(**batch)
    assert_close(seen[1], seen[0].roll(1, dims=0))
    assert (seen[0] - seen[2]).abs().max() > 1e-3


def test_readings_tell_how_far_gates_are_open() -> None:
    bank, _ = bank_at(tiny_llava(), LANGUAGE_SITE, image=2, fresh=True)
    assert bank.readings() == {f"gate/{name}/{kind}": 0.0 for name in LENGTHS for kind in ("text", "image")}
    with torch.no_grad():
        bank.get_parameter("shared_image_gates").fill_(-0.5)
    assert bank.readings()["gate/shared/image"] == pytest.approx(torch.tensor(0.5).tanh().item())
    assert bank.readings()["gate/shared/text"] == 0
    assert bank.undecayed() >= {"expert_text_gates", "shared_image_gates"}


def test_growing_trimming_and_freezing_keep_the_others() -> None:
    bank, attention = bank_at(tiny_llava().double(), LANGUAGE_SITE)
    x, kwargs = inputs_of(attention)

    def run(*weights: float) -> Tensor:
        routing = Routing.constant(torch.tensor(weights, dtype=torch.float64))
        with torch.no_grad():
            found: Tensor = bank.adapt(attention, x, routing, None, **kwargs)[0]
        return found

    expected, without_b = run(0.2, 0.3, 0.5), run(0.2, 0.0, 0.5)
    bank.grow(Adapter("d", Prefix(length=4), 3))
    assert_close(run(0.2, 0.3, 0.5), expected)
    assert_close(run(0.2, 0.3, 0.5, 0.9), expected)
    for name in ("a", "shared"):
        bank.freeze(name)
        assert_close(run(0.2, 0.3, 0.5, 0.9), expected)
    bank.trim(["c", "a"])
    assert_close(run(0.5, 0.2), without_b)
    bank.trim([])
    bank.freeze("shared")
    assert bank.names == ("shared",)


def test_a_bank_without_adapters_leaves_the_attention() -> None:
    base = tiny_llava().double()
    site = next(site for site in anatomy(base).sites if site.path == LANGUAGE_SITE)
    bank = Prefix.bank(site, [Adapter("a", Prefix(), 0)], base.get_submodule(LANGUAGE_SITE))
    bank.trim([])
    x, kwargs = inputs_of(base.get_submodule(LANGUAGE_SITE))
    found = bank.adapt(base.get_submodule(LANGUAGE_SITE), x, None, None, **kwargs)[0]
    assert torch.equal(found, base.get_submodule(LANGUAGE_SITE)(x, **kwargs)[0])


def test_what_has_no_attention_interface_is_refused() -> None:
    with pytest.raises(ValueError, match=r"such as model\.language_model\.layers\.0\.mlp: it does not attend"):
        attach(tiny_llava(), shared=Prefix(), placement=Placement(kinds=("mlp",)))
    with pytest.raises(ValueError, match=r"window_attn is a Florence2VisionWindowAttention"):
        attach(build("florence2"), shared=Prefix(), placement=Placement(towers=("vision",)))


def test_prefixes_of_one_site_serve_the_same_tokens() -> None:
    with pytest.raises(ValueError, match=r"self_attn: prefixes of one site serve the same tokens.*'a': \('all',\)"):
        attach(tiny_llava(), experts={"a": Prefix(), "b": APART}, router=ByTask())
    with pytest.raises(ValueError, match=r"vision_tower.*serve the same tokens, and some"):
        attach(tiny_llava(), shared=Prefix(image_length=0), placement=EVERYWHERE)


def test_calls_that_do_not_tell_image_tokens_are_refused() -> None:
    mixture = attach(tiny_llava(), shared=APART)
    embeddings = mixture.base.get_input_embeddings()(torch.arange(5, 9)[None])
    with pytest.raises(ValueError, match=r"self_attn: image_length tells image tokens from text, which this call does"):
        mixture(inputs_embeds=embeddings)
    for base in (tiny_llama(), build("florence2")):
        with pytest.raises(ValueError, match="leave image_length unset"):
            attach(base, shared=APART)


@pytest.mark.parametrize(
    "lengths", [{"length": 0}, {"length": -1}, {"length": 0, "image_length": 0}, {"length": 2, "image_length": -1}]
)
def test_bad_lengths_are_refused(lengths: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"Prefix got length="):
        Prefix(**lengths)


def test_it_cannot_be_merged_or_run_without_attention() -> None:
    bank, _ = bank_at(tiny_llava(), LANGUAGE_SITE)
    with pytest.raises(NotMergeable, match=r"layers\.1\.self_attn: a prefix is more keys and values"):
        bank.delta(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn: .* run the bank by `adapt`"):
        bank(torch.randn(1, 2, 32), torch.randn(1, 2, 32), None)


def test_queries_of_another_shape_are_refused() -> None:
    bank, _ = bank_at(tiny_llava(), LANGUAGE_SITE)
    with pytest.raises(ValueError, match=r"made for 4 heads of 8, but the queries have shape \(1, 8, 2, 4\)"):
        bank.read(torch.randn(1, 8, 2, 4), 1.0, weights=torch.ones(1, 1, 1, 4), image=None)


def test_routings_by_token_reach_every_token() -> None:
    batch = llava_batch()
    tokens = batch["input_ids"].shape[1]
    weights = torch.zeros(3, tokens, 1, 3)
    weights[:, 2, 0, 1] = 1.0  # one token alone is given an expert
    mixture = attach(
        tiny_llava(),
        experts={n: Prefix(length=2) for n in EXPERTS},
        router=Given(value=Routing(weights, 3)),
        placement=Placement(depth=(0, 0.3)),
    )
    randomize(mixture)
    found, plain = outputs_of_the_site(mixture, batch)
    changed = (found - plain).abs().amax(dim=-1) > 1e-5
    assert changed.nonzero().tolist() == [[row, 2] for row in range(3)]


def outputs_of_the_site(mixture: Mixture, batch: dict[str, Tensor]) -> list[Tensor]:
    """Run a mixture and its base, and return what the module of its only site gives."""
    seen: list[Tensor] = []
    (site,) = mixture.sites
    mixture.base.get_submodule(site.path).register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        mixture(**batch)
        with mixture.disabled():
            mixture(**batch)
    return seen


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
