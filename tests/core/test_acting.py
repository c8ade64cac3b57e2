"""Adapters that act on some tokens only: which ones these are, and that no other token is touched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, Placement, attach, load
from moadapt.acting import RANGES, TokenRange, acting, ranges_of
from moadapt.adapted import AdaptedModule
from moadapt.adapters import FamilySpec, LoRA, NormTuning, NotMergeable, Prefix, PromptTokens
from moadapt.call import Call, Request, read_call
from moadapt.registry import FAMILIES
from moadapt.sites import Site
from moadapt_routers import ByTask, Constant, Softmax
from tests.conformance.canonical import TASKS
from tests.conformance.test_families import generate, logits
from tests.models import (
    PATCHES,
    llava_batch,
    padded,
    prompt_of,
    ragged_prompts,
    randomize,
    tiny_llama,
    tiny_llava,
    uneven_images,
    unpadded,
)

SITE = Site("blocks.0.linear", "language", "attention", 0, 8, 8)
LIMITS: tuple[TokenRange, ...] = RANGES[1:]
over_limits = pytest.mark.parametrize("acts_on", LIMITS)
FAMILY_PARAMS = [pytest.param(family, id=name) for name, family in FAMILIES if family.standalone]


def told(call: Call, *ranges: TokenRange) -> list[str]:
    """Which tokens are within all ranges, a row as a word of 0 and 1."""
    assert call.real is not None
    found = acting(call, SITE, ranges, torch.zeros(*call.real.shape, 8))
    return ["".join(str(int(token)) for token in row) for row in found]


def read(ids: list[list[int]], labels: list[list[int]] | None = None, **said: Any) -> Call:
    """A call of tokens, of which 0 is padding and 3 an image patch; labels are told where they are not 0."""
    tokens = torch.tensor(ids)
    inputs = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    if labels is not None:
        inputs["labels"] = torch.tensor(labels).masked_fill(torch.tensor(labels) == 0, -100)
    return read_call(inputs, Request(**said), (3,), continues=False)


def test_ranges_follow_images_prompt_and_padding() -> None:
    ids = [
        [0, 3, 3, 7, 8, 9, 9],  # padded on the left, image first
        [7, 8, 3, 3, 9, 9, 0],  # padded on the right, text first
        [3, 3, 7, 3, 3, 9, 9],  # two images
        [5, 6, 7, 8, 9, 9, 9],  # none
    ]
    call = read(ids, [[9 if token == 9 else 0 for token in row] for row in ids])
    assert told(call, "image") == ["0110000", "0011000", "1101100", "0000000"]
    assert told(call, "text") == ["0001111", "1100110", "0010011", "1111111"]
    assert told(call, "question") == ["0001100", "1100000", "0010000", "1111000"]
    assert told(call, "answer") == ["0000011", "0000110", "0000011", "0000111"]
    assert told(call, "rows_with_image") == ["1111111", "1111111", "1111111", "0000000"]
    assert told(call, "rows_without_image") == ["0000000", "0000000", "0000000", "1111111"]
    assert told(call, "text", "rows_with_image") == ["0001111", "1100110", "0010011", "0000000"]


def test_what_stands_before_a_prompt_mask_is_no_answer() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 0]])
    call = read([[5, 6, 7, 8, 9]], prompt_mask=mask)
    assert told(call, "question") == ["01010"]
    assert told(call, "answer") == ["00001"]


def test_inserted_tokens_are_of_no_range() -> None:
    call = read([[0, 5, 5, 3, 7]], inserted=torch.tensor([[1, 2]]))
    assert told(call, "text") == ["00001"]
    assert told(call, "answer") == ["00000"]
    assert told(call, "rows_with_image") == ["11111"]


def test_what_continues_a_cache_is_answer_and_text() -> None:
    call = read_call(
        {"input_ids": torch.tensor([[7], [8]]), "attention_mask": torch.ones(2, 6)}, Request(), (3,), continues=True
    )
    call.with_image = torch.tensor([True, False])
    assert [told(call, name) for name in ("answer", "text", "question", "image")] == [["1", "1"]] * 2 + [["0", "0"]] * 2
    assert told(call, "rows_with_image") == ["1", "0"]


def test_several_ranges_are_told_in_one_order() -> None:
    assert ranges_of("all") == ranges_of(("all",)) == ()
    assert ranges_of(("rows_with_image", "text", "all", "text")) == ("text", "rows_with_image")
    assert LoRA(acts_on=("rows_with_image", "answer")).ranges == LoRA(acts_on=("answer", "rows_with_image")).ranges


@pytest.mark.parametrize(
    ("acts_on", "message"),
    [
        ("words", r"acts_on is 'words'; choose from all, image, text"),
        ((), r"acts_on is \(\); choose from"),
        (("image", "question"), "no token is within both image and question"),
        (("rows_with_image", "rows_without_image"), "no token is within both"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(acts_on: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny_llava(), shared=LoRA(acts_on=acts_on))


def mixed(family: FamilySpec, shared: FamilySpec | None = None, *, router: Any = None, **how: Any) -> Mixture:
    """A mixture of random adapters: three experts of a family beside a shared adapter."""
    base = how.pop("base", None)
    mixture = attach(
        tiny_llava() if base is None else base,
        shared=shared,
        experts=dict.fromkeys(TASKS, family),
        router=router or Softmax(),
        **how,
    )
    randomize(mixture)
    return mixture.eval()


def compare_with_naive(mixture: Mixture, batch: dict[str, Tensor]) -> list[float]:
    """Run the mixture and return, for every site, how far it is from masking each bank's own delta."""
    apart: list[float] = []

    def judge(wrapper: AdaptedModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, site = mixture.context.call, wrapper._site
        assert call is not None
        x = args[0] if args else kwargs["hidden_states"]
        routing = mixture.context.route(call, site, x)
        frozen = wrapper.module(*args, **kwargs)
        y = expected = frozen[0] if isinstance(frozen, tuple) else frozen
        for bank in wrapper.banks:
            mask = acting(call, site, bank.acts_on, x) if bank.acts_on else torch.ones(x.shape[:2])
            expected = expected + bank(x, y, routing, call) * mask.unsqueeze(-1).to(y.dtype)
        found = output[0] if isinstance(output, tuple) else output
        apart.append(float((found - expected).abs().max() / expected.abs().max()))

    wrappers = [module for module in mixture.modules() if isinstance(module, AdaptedModule)]
    handles = [w.register_forward_hook(judge, with_kwargs=True) for w in wrappers if w._site.form != "entry"]
    assert handles
    with torch.no_grad():
        mixture(**batch, task=TASKS, use_cache=False)
    for handle in handles:
        handle.remove()
    return apart


@over_limits
@pytest.mark.parametrize("family", [each for each in FAMILY_PARAMS if each.values[0].causal])
def test_a_masked_bank_equals_a_masked_delta(family: type[FamilySpec], acts_on: TokenRange) -> None:
    mixture = mixed(family(acts_on=acts_on), family(acts_on="answer"), base=tiny_llava().double()).double()
    batch = {n: t.double() if n == "pixel_values" else t for n, t in padded(llava_batch(), 2, "left").items()}
    apart = compare_with_naive(mixture, batch)
    assert apart
    assert max(apart) < 1e-10


@over_limits
@pytest.mark.parametrize("router", [Softmax(), Softmax(scope="token"), ByTask()], ids=["sequence", "token", "task"])
def test_a_cache_changes_no_token_and_rows_stay_alone(router: Any, acts_on: TokenRange) -> None:
    mixture, prompt = mixed(LoRA(acts_on=acts_on), LoRA(), router=router), ragged_prompts()
    cached = generate(mixture, prompt)
    assert torch.equal(cached, generate(mixture, prompt, use_cache=False))
    assert torch.equal(generate(mixture, prompt, num_beams=2), generate(mixture, prompt, num_beams=2, use_cache=False))
    alone = [generate(mixture, unpadded(prompt, row), TASKS[row]) for row in range(3)]
    assert torch.equal(cached, torch.cat(alone))


def test_rows_with_and_without_images_are_remembered_with_the_cache() -> None:
    prompt = uneven_images(prompt_of(llava_batch()))
    for acts_on in ("rows_with_image", "rows_without_image"):
        mixture = mixed(LoRA(acts_on=acts_on), router=Softmax())
        assert torch.equal(generate(mixture, prompt), generate(mixture, prompt, use_cache=False))


def test_all_tokens_are_those_of_an_ordinary_adapter() -> None:
    batch = llava_batch()
    expected = logits(mixed(LoRA(), LoRA(lr_ratio=2.0)), batch)
    assert torch.equal(logits(mixed(LoRA(acts_on="all"), LoRA(lr_ratio=2.0, acts_on=("all",))), batch), expected)
    first_task = torch.zeros(3, dtype=torch.long)
    parts = attach(
        tiny_llava(), experts={n: LoRA(acts_on=n) for n in ("image", "text")}, router=Constant(weights=(1, 1))
    )
    whole = attach(tiny_llava(), shared=LoRA())
    randomize(whole)
    for (_, one), (_, two), (_, all_of_it) in zip(*[iter(parts.banks())] * 2, whole.banks(), strict=False):
        for bank in (one, two):
            bank.load_state(bank.names[0], all_of_it.state("shared"))
    found, plain = (logits(each.eval(), batch, first_task) for each in (parts, whole))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def image_cache(mixture: Mixture, batch: dict[str, Tensor], **how: Any) -> list[Tensor]:
    with torch.no_grad():
        cache = mixture(**batch, use_cache=True, **how).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return [tensor[:, :, :PATCHES] for pair in layers for tensor in pair]


def test_keys_and_values_of_images_depend_neither_on_the_question_nor_on_adapters_of_text() -> None:
    mixture, batch = mixed(LoRA(acts_on="text"), router=ByTask()), llava_batch()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, PATCHES:] = llava_batch(seed=5)["input_ids"][:, PATCHES:]
    expected = image_cache(mixture, batch, task=TASKS)
    with mixture.disabled():
        plain = image_cache(mixture, batch)
    for found in (image_cache(mixture, other, task=TASKS), image_cache(mixture, batch, task=TASKS[::-1]), plain):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ordinary = mixed(LoRA(), router=ByTask())
    assert not torch.equal(image_cache(ordinary, batch, task=TASKS)[-1], expected[-1])
    assert (logits(mixture, batch) - logits(mixture, batch, TASKS[::-1])).abs().max() > 1e-3


def test_an_expert_of_images_leaves_rows_of_text_alone() -> None:
    prompt = uneven_images(prompt_of(llava_batch()))
    kinds = {"words": LoRA(), "pictures": LoRA(acts_on="image")}
    with_both = attach(tiny_llava(), experts=kinds, router=Constant(weights=(0.5, 0.5)))
    randomize(with_both)
    first_task = torch.zeros(3, dtype=torch.long)
    with with_both.override({"words": 0.5}):
        expected = logits(with_both.eval(), prompt, first_task)
    found = logits(with_both, prompt, first_task)
    assert torch.equal(found[1], expected[1])  # the row without image
    assert ((found - expected).abs().amax(dim=(1, 2)) > 1e-3).tolist() == [True, False, True]


def test_where_no_token_is_meant_the_base_is_left_bit_for_bit() -> None:
    batch = prompt_of(llava_batch())
    for acts_on in ("answer", "rows_without_image"):
        mixture = mixed(LoRA(acts_on=acts_on), LoRA(acts_on=acts_on))
        with mixture.disabled():
            plain = logits(mixture, batch)
        assert torch.equal(logits(mixture, batch), plain)


def test_checkpointing_and_storage_keep_what_is_acted_on(tmp_path: Path) -> None:
    mixture, batch = mixed(LoRA(acts_on=("question", "rows_with_image"))), llava_batch()
    mixture.save(tmp_path / "saved")
    expected = logits(mixture, batch)
    assert torch.equal(logits(load(tmp_path / "saved", tiny_llava()).eval(), batch), expected)

    def gradients() -> list[Tensor]:
        mixture.train().zero_grad()
        mixture(**batch, use_cache=False).loss.backward()
        return [p.grad.clone() for _, p in mixture.named_adapter_parameters() if p.grad is not None]

    plain = gradients()
    mixture.gradient_checkpointing_enable()
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_norms_of_heads_are_masked_too() -> None:
    from tests.core.zoo import build

    mixture = attach(build("qwen3"), shared=NormTuning(acts_on="answer"))
    randomize(mixture)
    ids = torch.randint(5, 60, (2, 8))
    with torch.no_grad():
        found = mixture.eval()(input_ids=ids, prompt_mask=torch.arange(8).expand(2, -1) < 5).logits
        with mixture.disabled():
            plain = mixture(input_ids=ids).logits
    assert torch.equal(found[:, :5], plain[:, :5])
    assert (found[:, 5:] - plain[:, 5:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize(
    ("spec", "placement", "message"),
    [
        (
            LoRA(acts_on="text"),
            Placement.named("vision"),
            r"vision.*every token is one of an image and nothing is text",
        ),
        (LoRA(acts_on="rows_without_image"), Placement.named("vision"), "nothing is rows_without_image"),
        (Prefix(acts_on="text"), None, r"Prefix of shared acts on text, but what it does there cannot be taken off"),
        (PromptTokens(acts_on="rows_with_image"), None, "PromptTokens of shared acts on rows_with_image"),
    ],
    ids=["text", "rows", "prefix", "prompt_tokens"],
)
def test_what_cannot_be_masked_is_refused(spec: FamilySpec, placement: Placement | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny_llava(), shared=spec, placement=placement)


def test_a_base_without_images_has_no_image_tokens() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no token that stands for image patches"):
        attach(tiny_llama(), shared=LoRA(acts_on="image"))
    with pytest.raises(ValueError, match=r"acts on answer, but lm_head lies outside the blocks"):
        attach(tiny_llama(), shared=LoRA(acts_on="answer"), placement=Placement(kinds=("other",)))
    mixture = attach(tiny_llama(), shared=LoRA(acts_on="question"))
    assert mixture(input_ids=torch.arange(5, 10)[None]).logits.isfinite().all()


def test_embeddings_do_not_tell_images() -> None:
    mixture, prompt = mixed(LoRA(acts_on="text"), router=ByTask()), prompt_of(llava_batch())
    embeddings = mixture.base.get_input_embeddings()(prompt["input_ids"])
    with pytest.raises(ValueError, match=r"inputs_embeds does not; pass input_ids"):
        mixture(inputs_embeds=embeddings, task=TASKS)


def test_a_merge_of_what_acts_on_some_tokens_is_refused(tmp_path: Path) -> None:
    mixture = mixed(LoRA(), LoRA(acts_on="text"), router=ByTask())
    with pytest.raises(NotMergeable, match=r"shared acts on text alone, but a weight changes every token"):
        mixture.merge("task", task="ask")
    with pytest.raises(NotMergeable, match="keep the mixture, or leave acts_on out"):
        mixture.export_peft(tmp_path / "out", task="ask")


def test_a_tower_of_images_merges_what_acts_on_images() -> None:
    mixture = mixed(LoRA(acts_on="image"), router=ByTask(), placement=Placement.named("vision"))
    batch = llava_batch()
    plain, report = mixture.merge("task", task="ask")
    assert report.exact
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, logits(mixture, batch, "ask"), rtol=1e-4, atol=1e-4)


def test_adapters_of_different_ranges_stack_apart() -> None:
    experts = {"a": LoRA(acts_on="text"), "b": LoRA(acts_on=("text",)), "c": LoRA(acts_on="answer"), "d": LoRA()}
    mixture = attach(tiny_llava(), experts=experts, router=Softmax())
    first = next(iter(mixture.sites))
    assert sorted(bank.names for site, bank in mixture.banks() if site == first) == [("a", "b"), ("c",), ("d",)]
