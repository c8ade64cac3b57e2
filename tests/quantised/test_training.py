"""Adapters on a quantised base do what they do on the plain base of the dequantised weights."""

from typing import Any

import pytest
import torch

from moadapt import Placement, attach, initialise, load
from moadapt.adapters import Bias, Bottleneck, FamilySpec, Hydra, LoRA, PeftTuner, Scale
from moadapt.bases import load_base
from moadapt.sites import anatomy
from moadapt_routers import ByTask, Softmax, TopK
from tests.models import randomize
from tests.quantised.bases import LINEARS, WEIGHTS_ONLY, batch, dense, quantised

FAMILIES: dict[str, FamilySpec] = {
    "lora": LoRA(rank=2),
    "pissa": LoRA(rank=2, init="pissa"),
    "corda": LoRA(rank=2, init="corda_preserve"),
    "hydra": Hydra(rank=2),
    "scale": Scale(),
    "bias": Bias(create=True),
    "bottleneck": Bottleneck(width=3),
    "dora": PeftTuner(kind="LORA", options={"r": 2, "use_dora": True}),
    "ia3": PeftTuner(kind="IA3"),
}
ILL_CONDITIONED = {"corda": 5e-3}  # it inverts what few rows tell of the inputs
TASKS = ["a", "b", "a"]


def mixture_on(base: Any, family: FamilySpec, router: Any = None) -> Any:
    torch.manual_seed(0)
    placement = Placement(modules=LINEARS) if not isinstance(family, Bottleneck) else Placement()
    mixture = attach(
        base, shared=family, experts={"a": family, "b": family}, router=router or ByTask(), placement=placement
    )
    initialise(mixture, batch())
    return mixture


@pytest.mark.parametrize("way", [*WEIGHTS_ONLY, "llm_int8"])
def test_the_sites_are_those_of_the_plain_base(way: str, folder: str) -> None:
    plain, _ = load_base(folder)
    assert anatomy(quantised(folder, way)).sites == anatomy(plain).sites


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", WEIGHTS_ONLY)
def test_outputs_and_gradients_are_those_over_the_dequantised_weights(way: str, name: str, folder: str) -> None:
    base = quantised(folder, way)
    plain = dense(folder, base)
    found = {}
    for which, each in (("packed", base), ("plain", plain)):
        mixture = mixture_on(each, FAMILIES[name])
        begun = {n: p.detach().clone() for n, p in mixture.named_adapter_parameters()}
        randomize(mixture, 0.1)
        mixture.train()
        outputs = mixture(**batch(), task=TASKS)
        outputs.loss.backward()
        gradients = {n: p.grad for n, p in mixture.named_adapter_parameters() if p.requires_grad}
        found[which] = begun, outputs.logits.detach(), gradients
    (begun, logits, gradients), (same, wanted, others) = found["packed"], found["plain"]
    assert begun.keys() == same.keys()
    torch.testing.assert_close(begun, same, rtol=1e-3, atol=ILL_CONDITIONED.get(name, 1e-4))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    torch.testing.assert_close(gradients, others, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", [Softmax(), TopK(k=1), Softmax(scope="token")])
@pytest.mark.parametrize("way", [*WEIGHTS_ONLY, "llm_int8"])
def test_a_routed_step_lowers_the_loss_and_leaves_the_base(way: str, router: Any, folder: str) -> None:
    base = quantised(folder, way)
    with torch.no_grad():
        before = base(**batch()).logits
    mixture = attach(base, experts={"a": LoRA(rank=2), "b": LoRA(rank=2)}, router=router)
    randomize(mixture, 0.05)
    mixture.train()
    optimizer = torch.optim.SGD([p for p in mixture.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = mixture(**batch()).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    again = mixture.detach()
    assert again is base
    with torch.no_grad():
        assert torch.equal(base(**batch()).logits, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", [*WEIGHTS_ONLY, "llm_int8"])
def test_it_computes_in_the_type_of_the_activations_and_is_saved(
    way: str, dtype: str, folder: str, tmp_path: Any
) -> None:
    mixture = mixture_on(quantised(folder, way, dtype), LoRA(rank=2)).eval()
    randomize(mixture, 0.1)
    with torch.no_grad():
        logits = mixture(**batch(), task=TASKS).logits
    assert logits.dtype == getattr(torch, dtype)
    mixture.freeze("b")
    mixture.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", quantised(folder, way, dtype)).eval()
    assert loaded.frozen == ("b",)
    with torch.no_grad():
        assert torch.equal(loaded(**batch(), task=TASKS).logits, logits)
    with pytest.raises(ValueError, match="other weights; load the base it was trained on, quantised if it was"):
        load(tmp_path / "saved", load_base(folder, dtype=dtype)[0])


@pytest.mark.parametrize("way", WEIGHTS_ONLY)
def test_generation_with_a_cache_is_that_without(way: str, folder: str) -> None:
    mixture = mixture_on(quantised(folder, way), LoRA(rank=2), Softmax()).eval()
    randomize(mixture, 0.1)
    prompt = {"input_ids": batch()["input_ids"], "attention_mask": batch()["attention_mask"]}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    cached, recomputed = (mixture.generate(**prompt, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, recomputed)
