"""Law 4: generation with a cache gives what full recomputation gives, and a batch what its rows give alone."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, RouterSpec
from tests.conformance.canonical import LANGUAGE, TASKS, Placement, exact, label, make, router_cases, router_specs
from tests.models import IMAGE_TOKEN, llava_batch, prompt_of, ragged_prompts, tiny_llama, unpadded

CASES = router_cases()
NEW = 5
FIXED = {"min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN]}
HOW = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
}


def generate(mixture: Mixture, prompt: dict[str, Tensor], task: Any = None, **how: Any) -> Tensor:
    """Generate the same number of tokens in every row and return just those."""
    torch.manual_seed(0)
    found = mixture.generate(**prompt, task=TASKS if task is None else task, **FIXED, **how)
    return found[:, prompt["input_ids"].shape[1] :]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("router", "placement"), CASES)
def test_a_cache_changes_no_token(router: RouterSpec, placement: Placement, how: str) -> None:
    mixture, prompt = make(router, placement), ragged_prompts()
    cached = generate(mixture, prompt, use_cache=True, **HOW[how])
    assert torch.equal(cached, generate(mixture, prompt, use_cache=False, **HOW[how]))
    assert len({tuple(row) for row in cached.tolist()}) > 1
    assert mixture.context.call is None


@pytest.mark.parametrize("how", ["greedy", "beams"])
@pytest.mark.parametrize(("router", "placement"), CASES)
def test_a_batch_gives_what_its_rows_give_alone(router: RouterSpec, placement: Placement, how: str) -> None:
    mixture, prompt = make(router, placement), ragged_prompts()
    together = generate(mixture, prompt, **HOW[how])
    alone = [generate(mixture, unpadded(prompt, row), TASKS[row], **HOW[how]) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(("router", "placement"), CASES)
def test_a_loop_of_forwards_gives_what_generate_gives(router: RouterSpec, placement: Placement) -> None:
    mixture, prompt = make(router, placement), ragged_prompts()
    expected = generate(mixture, prompt, do_sample=False)
    mask, inputs, found = prompt["attention_mask"], dict(prompt), []
    cache = None
    for _ in range(NEW):
        with torch.no_grad():
            out = mixture(**inputs, past_key_values=cache, use_cache=True, task=TASKS)
        scores = out.logits[:, -1]
        scores[:, [2, IMAGE_TOKEN]] = -torch.inf  # as `FIXED` does
        cache, token = out.past_key_values, scores.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        inputs = {"input_ids": token, "attention_mask": mask}
        found.append(token)
    assert torch.equal(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize(("router", "placement"), CASES)
def test_generation_routes_as_training_does(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement).double(), exact(llava_batch())
    with torch.no_grad(), mixture.trace() as training:
        mixture(**batch, task=TASKS)
    with mixture.trace() as generating:
        generate(mixture, prompt_of(batch), do_sample=False)
    assert generating.routings.keys() == training.routings.keys()
    for place, (weights,) in training.routings.items():
        first = generating.routings[place][0]
        known = weights[:, : first.shape[1]]
        torch.testing.assert_close(first, known, rtol=0, atol=1e-5, msg=place)
        assert len(generating.routings[place]) == 1 or router.scope == "token"


@pytest.mark.parametrize(("router", "placement"), CASES)
def test_a_static_cache_changes_no_token(router: RouterSpec, placement: Placement) -> None:
    mixture, prompt = make(router, placement), ragged_prompts()
    found = generate(mixture, prompt, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, generate(mixture, prompt, do_sample=False))


@pytest.mark.parametrize("router", list(router_specs()), ids=label)
def test_embeddings_give_the_same_tokens_or_are_refused(router: RouterSpec) -> None:
    mixture, prompt = make(router, LANGUAGE), ragged_prompts()
    expected = generate(mixture, prompt, do_sample=False)
    with torch.no_grad():
        embeddings = mixture.base.get_input_embeddings()(prompt["input_ids"])
        patches = torch.cat(list(mixture.base.get_image_features(pixel_values=prompt["pixel_values"]).pooler_output))
    embeddings = embeddings.masked_scatter((prompt["input_ids"] == IMAGE_TOKEN).unsqueeze(-1), patches)
    inputs = {"inputs_embeds": embeddings, "attention_mask": prompt["attention_mask"], "task": TASKS, **FIXED}
    if router.depends_on == "input" and router.scope == "sequence":
        with pytest.raises(ValueError, match="pass input_ids"):
            mixture.generate(**inputs, do_sample=False)
    else:
        assert torch.equal(mixture.generate(**inputs, do_sample=False), expected)


@pytest.mark.parametrize(("router", "placement"), CASES)
def test_a_foreign_cache_is_refused(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement), llava_batch()
    prompt = prompt_of(batch)
    with torch.no_grad(), mixture.disabled():
        cache = mixture(**prompt, use_cache=True).past_key_values
    one = {"input_ids": batch["input_ids"][:, -1:], "past_key_values": cache}
    with pytest.raises(ValueError, match="past_key_values holds tokens that this mixture did not process"):
        mixture(**one, task=TASKS)
    assert mixture.context.call is None
    with torch.no_grad(), mixture.disabled():  # the bare base may go on with it
        assert mixture(**one).logits.isfinite().all()


def test_a_cache_of_another_mixture_is_refused() -> None:
    router = next(router_specs())
    batch = llava_batch()
    cache = make(router)(**prompt_of(batch), task=TASKS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="did not process"):
        make(router)(input_ids=batch["input_ids"][:, -1:], past_key_values=cache, task=TASKS)


@pytest.mark.parametrize("router", list(router_specs(scope="sequence", depends_on="input")), ids=label)
def test_a_prompt_in_chunks_is_refused(router: RouterSpec) -> None:
    mixture, prompt = make(router, LANGUAGE), ragged_prompts()
    del prompt["pixel_values"]
    prompt["input_ids"] = prompt["input_ids"].masked_fill(prompt["input_ids"] == 3, 7)
    assert generate(mixture, prompt, do_sample=False).shape == (3, NEW)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(mixture, prompt, do_sample=False, prefill_chunk_size=4)


@pytest.mark.parametrize(("router", "placement"), CASES)
def test_a_cache_changes_no_token_of_text_alone(router: RouterSpec, placement: Placement) -> None:
    mixture, prompt = make(router, placement), ragged_prompts()
    del prompt["pixel_values"]
    prompt["input_ids"] = prompt["input_ids"].masked_fill(prompt["input_ids"] == 3, 7)
    cached = generate(mixture, prompt, do_sample=False)
    assert torch.equal(cached, generate(mixture, prompt, do_sample=False, use_cache=False))


@pytest.mark.parametrize(("router", "placement"), CASES)
def test_an_override_holds_where_a_cache_is_continued(router: RouterSpec, placement: Placement) -> None:
    mixture, batch = make(router, placement), llava_batch()
    rest = {"input_ids": batch["input_ids"][:, -1:]}

    def go_on(overridden: bool) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            cache = mixture(**prompt_of(batch), task=TASKS).past_key_values
            with mixture.override({"tell": 2.0}) if overridden else nullcontext(), mixture.trace() as trace:
                first = mixture(**rest, past_key_values=cache, task=TASKS).logits
            if overridden:
                assert all(weights.flatten().tolist() == [0, 2, 0] for (weights,) in trace.routings.values())
                assert len(trace.routings) == len(mixture.places)
            return first, mixture(**rest, past_key_values=cache, task=TASKS).logits

    (overridden, after), (plain, _) = go_on(True), go_on(False)
    assert not torch.equal(overridden, plain)
    assert after.isfinite().all()  # what the cache holds is held on


@pytest.mark.parametrize("router", list(router_specs()), ids=label)
def test_a_cache_changes_no_token_where_nothing_is_given(router: RouterSpec) -> None:
    mixture = make(router, LANGUAGE, base=tiny_llama())
    cached, whole = (
        mixture.generate(bos_token_id=1, task="tell", use_cache=use_cache, do_sample=False, **FIXED)
        for use_cache in (True, False)
    )
    assert cached.shape == (1, 1 + NEW)
    assert torch.equal(cached, whole)
