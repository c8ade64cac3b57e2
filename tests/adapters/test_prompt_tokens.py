"""Prompt tokens against embeddings that are joined by hand, and what they do to sequences."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForQuestionAnswering
from transformers.generation.streamers import BaseStreamer

from moadapt import Mixture, Routing, attach
from moadapt.adapters import LoRA, NotMergeable, PromptTokens
from moadapt.adapters.bank import Adapter
from moadapt.adapters.prompt_tokens import PromptTokensBank
from moadapt.call import Request
from moadapt.inserting import insert
from moadapt.insertion import Inserted
from moadapt_routers import ByTask, Constant, Softmax
from tests.conformance.canonical import EXPERTS, TASKS, Given, routing_value
from tests.core.zoo import batch_of, build
from tests.models import (
    IMAGE_TOKEN,
    llava_batch,
    padded,
    prompt_of,
    ragged_prompts,
    randomize,
    rows_of,
    tiny_llama,
    tiny_llava,
)

SHARED, LENGTH = 2, 3
NEW = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}


def mixture_of(base: Any, router: Any = None, *, shared: bool = True) -> Mixture:
    """Three experts of three tokens each, and a shared adapter of two."""
    mixture = attach(
        base,
        shared=PromptTokens(length=SHARED) if shared else None,
        experts={name: PromptTokens(length=LENGTH) for name in EXPERTS},
        router=router or Softmax(),
    )
    randomize(mixture)
    return mixture.to(base.dtype).eval()


def insert_of(mixture: Mixture, batch: dict[str, Tensor]) -> Inserted:
    return insert(batch, Request(), mixture.inserts, mixture.placeholder)


def bank_in(mixture: Mixture) -> PromptTokensBank:
    ((_, bank),) = mixture.banks()
    assert isinstance(bank, PromptTokensBank)
    return bank


def text(rows: int, side: str) -> dict[str, Tensor]:
    """Rows of token ids, each with one token more of padding than the one before."""
    ids, mask = torch.randint(5, 60, (rows, 7)), torch.ones(rows, 7, dtype=torch.long)
    for row in range(rows):
        pad = row % 4
        if side == "left":
            mask[row, :pad] = 0
        elif side == "right":
            mask[row, 7 - pad :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("rows", [1, 2, 3, 20])
def test_it_equals_embeddings_joined_by_hand(rows: int, side: str) -> None:
    """Row by row and without padding, with gradients; also where there are as many rows as tokens."""
    base = tiny_llama().double()
    routing = routing_value("sequence_dense", rows=rows, tokens=1, dtype=torch.float64)
    routing.weights.requires_grad_()
    mixture, batch = mixture_of(base, Given(value=routing)), text(rows, side)
    bank = bank_in(mixture)
    leaves = {name: bank.state(name)["tokens"].requires_grad_() for name in ("shared", *EXPERTS)}
    found = mixture(**batch).logits
    assert found.shape[:2] == batch["input_ids"].shape
    real, own = batch["attention_mask"].bool(), []
    for row in range(rows):
        weighed = sum(routing.weights[row, 0, 0, e] * leaves[name] for e, name in enumerate(EXPERTS))
        embedded = base.get_input_embeddings()(batch["input_ids"][row][real[row]])
        joined = torch.cat([leaves["shared"], weighed, embedded])  # type: ignore[list-item]
        with mixture.disabled():
            places = torch.arange(len(joined))[None] + int(batch["attention_mask"][row].argmax())  # rotary in float32
            own.append(base(inputs_embeds=joined[None], position_ids=places).logits[0, SHARED + LENGTH :])
    expected, found = torch.cat(own), found[real]
    assert_close(found, expected)
    into = torch.randn_like(expected)
    stacks = (bank.get_parameter("shared_tokens"), bank.get_parameter("expert_tokens"), routing.weights)
    ours = torch.autograd.grad(found, stacks, into)
    theirs = torch.autograd.grad(expected, (*leaves.values(), routing.weights), into)
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], torch.cat(theirs[1:-1]))
    assert_close(ours[2], theirs[-1])


def test_tokens_enter_without_the_rounding_of_what_they_replace() -> None:
    base = tiny_llama().to(torch.bfloat16)
    with torch.no_grad():
        base.get_input_embeddings().weight.normal_()
    mixture = attach(base, shared=PromptTokens(length=LENGTH)).eval()
    entered: list[Tensor] = []
    block = mixture.base.get_submodule("model.layers.0.module")
    block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        mixture(input_ids=torch.tensor([[5, 6]]))
    tokens = bank_in(mixture).state("shared")["tokens"]
    assert torch.equal(entered[0][0, :LENGTH], tokens.to(torch.bfloat16))


def test_a_fresh_adapter_is_no_identity() -> None:
    assert not PromptTokens.identity
    with torch.no_grad():
        plain = tiny_llava()(**llava_batch()).logits
        mixture = attach(tiny_llava(), shared=PromptTokens())
        found = mixture(**llava_batch()).logits
        assert found.shape == plain.shape
        assert (found - plain).abs().max() > 1e-3
        with mixture.disabled():
            assert torch.equal(mixture(**llava_batch()).logits, plain)


def test_a_cache_is_continued_by_hand() -> None:
    mixture, batch = mixture_of(tiny_llava()), ragged_prompts()
    more = torch.randint(5, 60, (3, 2))
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    with torch.no_grad():
        whole = mixture(
            **{**batch, "input_ids": torch.cat([batch["input_ids"], more], dim=1), "attention_mask": mask},
            prompt_mask=torch.cat([batch["attention_mask"], torch.zeros_like(more)], dim=1).bool(),
        ).logits
        first = mixture(**batch)
        found = [first.logits]
        for i in range(2):
            step = {"input_ids": more[:, i : i + 1], "attention_mask": mask[:, : mask.shape[1] - 1 + i]}
            found.append(mixture(**step, past_key_values=first.past_key_values).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, dim=1)[real], whole[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_the_same_with_every_cache(beams: int) -> None:
    mixture, prompt = mixture_of(tiny_llava()), ragged_prompts()
    expected = mixture.generate(**prompt, **NEW, num_beams=beams, use_cache=False)
    assert torch.equal(expected[:, : prompt["input_ids"].shape[1]], prompt["input_ids"])
    assert expected.shape[1] == prompt["input_ids"].shape[1] + 4
    assert torch.equal(mixture.generate(**prompt, **NEW, num_beams=beams), expected)
    assert torch.equal(mixture.generate(**prompt, **NEW, num_beams=beams, cache_implementation="static"), expected)


def test_generation_goes_on_from_a_cache_of_the_mixture() -> None:
    mixture, prompt = mixture_of(tiny_llama(), Constant()), text(2, "left")
    whole = mixture.generate(**prompt, **{**NEW, "max_new_tokens": 6, "min_new_tokens": 6})
    first = mixture.generate(**prompt, **NEW, return_dict_in_generate=True)
    assert torch.equal(first.sequences, whole[:, :-2])
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    how = {**NEW, "max_new_tokens": 2, "min_new_tokens": 2}
    found = mixture.generate(
        input_ids=first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **how
    )
    assert torch.equal(found, whole)


def test_many_sequences_a_row_keep_their_prompt() -> None:
    mixture, prompt = mixture_of(tiny_llava()), ragged_prompts()
    how = {**NEW, "num_beams": 3, "num_return_sequences": 3}
    found = mixture.generate(**prompt, **how)
    assert torch.equal(found[:, : prompt["input_ids"].shape[1]], prompt["input_ids"].repeat_interleave(3, dim=0))


def test_max_length_counts_the_callers_tokens() -> None:
    mixture = mixture_of(tiny_llama(), Constant())
    found = mixture.generate(input_ids=text(2, "none")["input_ids"], max_length=9, min_length=9, do_sample=False)
    assert found.shape == (2, 9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    mixture, batch = mixture_of(tiny_llava()), prompt_of(llava_batch())
    with torch.no_grad():
        found, expected = mixture(**padded(batch, 3, side)).logits, mixture(**batch).logits
    found = found[:, 3:] if side == "left" else found[:, :-3]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_routers_do_not_read_them() -> None:
    """What a router sees of the prompt at the entry is what it sees without inserted tokens."""
    batch, weights = ragged_prompts(), []
    for shared in (None, PromptTokens(length=5)):
        torch.manual_seed(3)
        mixture = attach(tiny_llava(), shared=shared, experts={n: LoRA() for n in EXPERTS}, router=Softmax())
        router = mixture.routers[0]
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad(), mixture.trace() as trace:
            for parameter in router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            mixture(**batch)
        weights.append(trace.routings["language.0"][0])
    torch.testing.assert_close(weights[0], weights[1])
    assert (weights[0][0] - weights[0][1]).abs().max() > 1e-3


def test_outputs_are_those_of_the_callers_tokens() -> None:
    mixture, batch = mixture_of(tiny_llava()), llava_batch()
    with torch.no_grad():
        whole = mixture(**batch, output_hidden_states=True)
        last = mixture(**prompt_of(batch), logits_to_keep=2)
        all_of_prompt = mixture(**prompt_of(batch))
        positions = torch.tensor([5, 7, 8])  # in right padding, where rows have real tokens and where not
        right = padded({name: batch[name] for name in batch if name != "labels"}, 2, "right")
        picked = mixture(**right, logits_to_keep=positions).logits
        torch.testing.assert_close(picked, mixture(**right).logits[:, positions])
    shape = batch["input_ids"].shape
    assert whole.logits.shape[:2] == shape
    assert {tuple(each.shape[:2]) for each in whole.hidden_states} == {tuple(shape)}
    torch.testing.assert_close(last.logits, all_of_prompt.logits[:, -2:])
    shifted, labels = whole.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    torch.testing.assert_close(whole.loss, torch.nn.functional.cross_entropy(shifted, labels, ignore_index=-100))


def test_attentions_are_those_among_the_callers_tokens() -> None:
    mixture, batch = mixture_of(tiny_llama(), Constant()), text(3, "left")
    mixture.base.set_attn_implementation("eager")
    with torch.no_grad():
        found = mixture(**batch, output_attentions=True)
        given = insert_of(mixture, batch)
        with mixture.context.requesting(given.request):
            whole = mixture.base(**given.inputs, output_attentions=True)
    where = given.where
    assert where is not None
    for cut, full in zip(found.attentions, whole.attentions, strict=True):
        assert cut.shape[-2:] == (7, 7)
        for row in range(3):
            own = where.own[row]
            assert torch.equal(cut[row], full[row][:, own][:, :, own])
    with pytest.raises(ValueError, match="leave output_attentions unset"):
        mixture.generate(**batch, **NEW, output_attentions=True)
    with pytest.raises(ValueError, match="leave output_attentions unset"):
        mixture(input_ids=torch.tensor([[5]] * 3), past_key_values=found.past_key_values, output_attentions=True)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "whole"])
def test_hidden_states_of_generation_are_those_of_the_callers_tokens(use_cache: bool) -> None:
    mixture, prompt = mixture_of(tiny_llama(), Constant()), text(3, "left")
    how = {**NEW, "use_cache": use_cache, "num_beams": 2, "num_return_sequences": 2}
    found = mixture.generate(**prompt, **how, return_dict_in_generate=True, output_hidden_states=True)
    lengths = [7] + ([1] * 3 if use_cache else [8, 9, 10])
    assert [step[0].shape[1] for step in found.hidden_states] == lengths
    with torch.no_grad():
        first = mixture(**prompt, output_hidden_states=True).hidden_states
    real = prompt["attention_mask"].repeat_interleave(2, dim=0).bool()
    for layer, states in zip(found.hidden_states[0], first, strict=True):
        torch.testing.assert_close(layer[real], states.repeat_interleave(2, dim=0)[real])


def test_a_streamer_gets_the_callers_prompt() -> None:
    class Kept(BaseStreamer):
        values: list[Tensor]
        ended = False

        def put(self, value: Tensor) -> None:
            self.values.append(value)

        def end(self) -> None:
            self.ended = True

    mixture, prompt, kept = mixture_of(tiny_llama(), Constant()), text(1, "none"), Kept()
    kept.values = []
    found = mixture.generate(**prompt, **NEW, streamer=kept)
    assert torch.equal(torch.cat([value.flatten() for value in kept.values]), found[0])
    assert kept.ended


def test_a_length_that_the_base_sets_counts_the_callers_tokens() -> None:
    mixture = mixture_of(tiny_llama(), Constant())
    mixture.base.generation_config.max_length = 16
    mixture.base.generation_config.eos_token_id = None
    assert mixture.generate(input_ids=text(2, "none")["input_ids"], do_sample=False).shape == (2, 16)


def test_spans_are_those_of_the_callers_tokens() -> None:
    """A head that points at tokens: what it points at moves, and its loss is that over the longer row."""
    base = LlamaForQuestionAnswering(tiny_llama().config).eval()
    mixture, batch = mixture_of(base, Constant()), text(3, "left")
    starts, ends = torch.tensor([3, 4, 5]), torch.tensor([4, 6, 5])
    given = insert_of(mixture, batch)
    assert given.where is not None
    with torch.no_grad():
        found = mixture(**batch, start_positions=starts, end_positions=ends)
        with mixture.context.requesting(given.request):
            whole = base(**given.inputs)
    losses = []
    for name, places in (("start_logits", starts), ("end_logits", ends)):
        full, cut = getattr(whole, name), getattr(found, name)
        assert torch.equal(cut, full.gather(1, given.where.own))
        moved = given.where.own.gather(1, places.unsqueeze(1)).flatten()
        losses.append(torch.nn.functional.cross_entropy(full, moved))
    torch.testing.assert_close(found.loss, sum(losses) / 2)


@pytest.mark.parametrize("name", ["paligemma", "gemma3", "qwen2_5_vl", "internvl", "idefics3"])
def test_many_bases_take_longer_rows(name: str) -> None:
    base, batch = build(name), batch_of(name)
    with torch.no_grad():
        plain = base(**batch).logits
        mixture = attach(base, experts={"a": PromptTokens(length=2), "b": PromptTokens(length=2)}, router=ByTask())
        randomize(mixture, scale=1.0)
        found = mixture(**batch, task=["a", "b"]).logits
        other = mixture(**batch, task=["a", "a"]).logits
    assert found.shape == plain.shape
    assert ((found - plain).flatten(1).abs().amax(dim=1) > 1e-5).all()
    torch.testing.assert_close(found[0], other[0])
    assert (found[1] - other[1]).abs().max() > 1e-6


def test_its_size_is_the_closed_form() -> None:
    mixture = attach(tiny_llava(), shared=PromptTokens(length=7))
    assert sum(p.numel() for _, p in mixture.named_adapter_parameters()) == 7 * 32


def test_an_expert_of_another_family_leaves_zeros() -> None:
    """Its rows have the inserted tokens too, and nothing stands there."""
    base = tiny_llama().double()
    experts = {"a": PromptTokens(length=2), "b": LoRA()}
    mixture, ids = attach(base, experts=experts, router=ByTask()), torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        found = mixture(input_ids=ids, task="b").logits
        embedded = base.get_input_embeddings()(ids)
        joined = torch.cat([embedded.new_zeros(1, 2, 32), embedded], dim=1)
        with mixture.disabled():
            expected = base(inputs_embeds=joined).logits[:, 2:]
    assert_close(found, expected)


def test_growing_trimming_and_freezing_keep_the_others() -> None:
    mixture, batch = mixture_of(tiny_llava(), Constant(weights=(0.2, 0.3, 0.5))), llava_batch()
    bank = bank_in(mixture)

    def run(weights: dict[str, float]) -> Tensor:
        with torch.no_grad(), mixture.override(weights):
            found: Tensor = mixture(**batch).logits
        return found

    expected, one = run({"ask": 0.2, "find": 0.5}), run({"ask": 1.0})
    for name in ("find", "shared"):
        bank.freeze(name)
        torch.testing.assert_close(run({"ask": 0.2, "find": 0.5}), expected)
    bank.grow(Adapter("new", PromptTokens(length=LENGTH), 3))
    torch.testing.assert_close(run({"ask": 0.2, "find": 0.5}), expected)
    bank.trim(["ask"])
    torch.testing.assert_close(run({"ask": 1.0}), one)


def test_experts_of_different_lengths_are_refused() -> None:
    experts = {"a": PromptTokens(length=2), "b": PromptTokens(length=3)}
    with pytest.raises(ValueError, match=r"different numbers of tokens, \{'a': 2, 'b': 3\}"):
        attach(tiny_llava(), experts=experts, router=ByTask())


def test_what_cannot_be_lengthened_is_refused() -> None:
    mixture = mixture_of(tiny_llama(), Constant())
    with pytest.raises(ValueError, match="got inputs_embeds"):
        mixture(inputs_embeds=torch.randn(1, 2, 32))
    with pytest.raises(ValueError, match="got position_ids"):
        mixture(input_ids=torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="leave prefill_chunk_size unset"):
        mixture.generate(**text(2, "none"), **NEW, prefill_chunk_size=3)
    by_token = mixture_of(tiny_llama(), Given(value=Routing(torch.ones(1, SHARED + LENGTH + 2, 1, 3), 3)))
    with pytest.raises(ValueError, match=r"model\.layers\.0: PromptTokens cannot be weighed by token"):
        by_token(input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="matches no site"):
        attach(build("t5"), shared=PromptTokens())


def test_bad_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="length=0; need 1 or more"):
        PromptTokens(length=0)


def test_it_cannot_be_merged() -> None:
    with pytest.raises(NotMergeable, match="prompt tokens lengthen the sequence"):
        bank_in(mixture_of(tiny_llava())).delta(torch.ones(3))


def test_tasks_of_a_mixed_batch_get_their_own_tokens() -> None:
    mixture, batch = mixture_of(tiny_llava(), ByTask()), llava_batch()
    with torch.no_grad():
        mixed = mixture(**batch, task=TASKS).logits
        for row, task in enumerate(TASKS):
            alone = mixture(**rows_of(batch, row), task=task).logits[0]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
