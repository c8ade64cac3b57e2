"""Laws where the shared adapter and the experts are of two families at the same sites."""

from itertools import permutations
from pathlib import Path

import pytest
import torch

from moadapt import Mixture, Placement, attach, load
from moadapt.adapters import Bias, Bottleneck, FamilySpec, Hydra, LoRA, Prefix, Scale
from moadapt_routers import Softmax
from tests.conformance.canonical import EXPERTS, TASKS
from tests.conformance.test_families import generate, logits
from tests.models import llava_batch, ragged_prompts, randomize, tiny_llava, unpadded

PAIRS = [
    *permutations((LoRA(), Hydra(), Scale(side="input"), Bias()), 2),
    *permutations((Bottleneck(), Prefix()), 2),
    (LoRA(lr_ratio=4.0), LoRA()),
    (Bottleneck(learn_scale=True), Bottleneck()),
]
"""What the shared adapter is, and what the experts are."""
over_pairs = pytest.mark.parametrize(
    ("shared", "expert"), PAIRS, ids=[f"{type(s).__name__}-{type(e).__name__}" for s, e in PAIRS]
)


def mixed(shared: FamilySpec, expert: FamilySpec) -> Mixture:
    mixture = attach(
        tiny_llava(),
        shared=shared,
        experts=dict.fromkeys(EXPERTS, expert),
        router=Softmax(),
        placement=Placement(kinds=("attention",)),
    )
    randomize(mixture)
    return mixture.eval()


@over_pairs
def test_two_families_at_a_site_keep_the_laws(shared: FamilySpec, expert: FamilySpec, tmp_path: Path) -> None:
    mixture, prompt, batch = mixed(shared, expert), ragged_prompts(), llava_batch()
    assert {len(wrapper) for wrapper in _banks(mixture)} == {2}
    cached = generate(mixture, prompt)
    assert torch.equal(cached, generate(mixture, prompt, use_cache=False))
    alone = [generate(mixture, unpadded(prompt, row), TASKS[row]) for row in range(3)]
    assert torch.equal(cached, torch.cat(alone))
    expected = logits(mixture, batch)
    with mixture.override({}):
        without = logits(mixture, batch)
    with mixture.disabled():
        assert (without - logits(mixture, batch)).abs().max() > 1e-3  # the shared adapter counts
    assert (expected - without).abs().max() > 1e-3  # and the experts do
    mixture.save(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", tiny_llava()).eval(), batch), expected)


def _banks(mixture: Mixture) -> list[list[object]]:
    found: dict[str, list[object]] = {}
    for site, bank in mixture.banks():
        found.setdefault(site.path, []).append(bank)
    return list(found.values())
