"""Laws 3 and 4 where an encoder reads the prompt: routers by sequence read it too, and never the decoder's tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, Placement, RouterSpec, attach
from moadapt.adapters import LoRA, NormTuning
from moadapt_routers import PromptMLP, Softmax, Sparsemax, TopK
from tests.bases.checks import Case, case_of
from tests.models import randomize

ROUTERS = {
    "model": Softmax(per="model"),
    "tower": TopK(k=1, per="tower"),
    "layer": Softmax(per="layer"),
    "sparse": Sparsemax(per="layer"),
    "prompt": PromptMLP(),
}
NAMES = ("t5", "florence2")
CASES = [pytest.param(name, router, id=f"{name}-{router}") for name in NAMES for router in ROUTERS]


def routed(name: str, router: RouterSpec, placement: Placement | None = None) -> tuple[Case, Mixture]:
    case = case_of(name)
    experts = {task: LoRA(rank=2) for task in ("a", "b", "c")}
    mixture = attach(case.of.model, experts=experts, router=router, placement=placement)
    randomize(mixture, 1.0)
    return case, mixture.eval()


def weights(mixture: Mixture, **inputs: Any) -> dict[str, Tensor]:
    with torch.no_grad(), mixture.trace() as trace:
        mixture(**inputs)
    return {place: found[0] for place, found in trace.routings.items()}


@pytest.mark.parametrize(("name", "router"), CASES)
def test_training_routes_as_generation_will(name: str, router: str) -> None:
    case, mixture = routed(name, ROUTERS[router])
    trained = weights(mixture, **case.training)
    if router in ("model", "layer", "prompt"):  # whose weights are not cut off
        assert any(w.flatten(1).std(dim=0).max() > 1e-4 for w in trained.values())  # rows differ
    with mixture.trace() as trace:
        mixture.generate(**case.prompts, max_new_tokens=3, do_sample=False)
    assert trace.routings.keys() == trained.keys()
    for place, expected in trained.items():
        for found in trace.routings[place]:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=place)


@pytest.mark.parametrize(("name", "router"), CASES)
def test_routing_is_blind_to_answers_and_other_rows(name: str, router: str) -> None:
    case, mixture = routed(name, ROUTERS[router])
    expected = weights(mixture, **case.training)
    others = {key: case.training[key].flip(0) for key in ("labels", "decoder_input_ids")}
    for place, found in weights(mixture, **{**case.training, **others}).items():
        assert torch.equal(found, expected[place])
    first = {"decoder_input_ids": case.prompts["decoder_input_ids"][:1]}
    for row, alone in enumerate(case.alone):
        for place, found in weights(mixture, **{**alone, **first}).items():
            torch.testing.assert_close(found[0], expected[place][row], rtol=1e-4, atol=1e-4, msg=place)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(("name", "router"), CASES)
def test_a_cache_changes_no_token(name: str, router: str, beams: int) -> None:
    case, mixture = routed(name, ROUTERS[router])
    told = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "num_beams": beams}
    cached, whole = (mixture.generate(**case.prompts, **told, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    case, mixture = routed(name, Softmax(per="layer"))
    mixture.train()
    gradients = []
    for _ in range(2):
        mixture.zero_grad()
        mixture(**case.training).loss.backward()
        gradients.append([p.grad.clone() for _, p in mixture.named_adapter_parameters() if p.grad is not None])
        mixture.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router", [Softmax(per="site"), Softmax(scope="token", per="layer")], ids=["site", "token"])
def test_routers_that_would_read_answers_are_refused(router: RouterSpec) -> None:
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*use per="):
        routed("t5", router)


@pytest.mark.parametrize("per", ["model", "layer"])
def test_blocks_that_run_in_parts_cannot_be_read(per: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.vision_tower\.blocks\.0, but Florence2.* runs the parts"):
        routed("florence2", Softmax(per=per), Placement(towers=("vision", "language")))


@pytest.mark.parametrize("name", NAMES)
def test_norms_of_a_decoder_outside_its_blocks_cannot_be_read(name: str) -> None:
    with pytest.raises(ValueError, match=r"which is of answers"):
        attach(case_of(name).of.model, experts={"a": NormTuning(), "b": NormTuning()}, router=Softmax(per="layer"))


def test_encoder_outputs_must_come_with_what_tells_the_prompt() -> None:
    case = case_of("t5")
    placement = Placement(depth=(0.5, 1.0))  # of the encoder and of the decoder
    mixture = attach(case.of.model, experts={"a": LoRA(), "b": LoRA()}, router=Softmax(), placement=placement)
    with torch.no_grad(), mixture.disabled():
        states = case.of.model.get_encoder()(case.prompts["input_ids"], case.prompts["attention_mask"])
    with pytest.raises(ValueError, match="encoder_outputs alone do not tell"):
        mixture(encoder_outputs=states, decoder_input_ids=case.prompts["decoder_input_ids"])


@pytest.mark.parametrize("router", ["model", "tower"])
def test_an_encoder_that_does_not_run_leaves_its_routers_nothing_to_read(router: str) -> None:
    case, mixture = routed("t5", ROUTERS[router])
    with torch.no_grad(), mixture.disabled():
        states = case.of.model.get_encoder()(case.prompts["input_ids"], case.prompts["attention_mask"])
    given = {"attention_mask": case.prompts["attention_mask"], "encoder_outputs": states}
    with pytest.raises(ValueError, match="pass input_ids, not encoder_outputs"):
        mixture(**given, decoder_input_ids=case.prompts["decoder_input_ids"])
