"""Offsets: where they sit, how many there are, and what a merge makes of them."""

from typing import Any

import pytest
import torch
from torch import nn

from moadapt import Mixture, Placement, attach
from moadapt.adapters import Bias
from tests.models import llava_7b, llava_batch, randomize, tiny_llama, tiny_llava

EVERYWHERE = Placement(towers=("vision", "connector", "language"))


def count(mixture: Mixture) -> int:
    return sum(parameter.numel() for _, parameter in mixture.named_adapter_parameters())


def biases_of(base: nn.Module, *, norms: bool = True) -> dict[str, int]:
    """Sizes of the biases of all linear layers and norms that LLaVA reads, by path."""
    unread = ("layers.3.", "post_layernorm")  # what follows the hidden states that it reads
    return {
        path: module.bias.numel()
        for path, module in base.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm) if norms else nn.Linear)
        and module.bias is not None
        and not ("vision_tower" in path and any(part in path for part in unread))
    }


def test_created_biases_sit_at_every_linear_layer() -> None:
    mixture = attach(tiny_llava(), shared=Bias())
    hidden, keys, inner, layers = 32, 2 * 8, 48, 3
    assert count(mixture) == layers * (hidden + 2 * keys + hidden + 2 * inner + hidden)


@pytest.mark.parametrize("norms", [True, False])
def test_without_creation_just_the_existing_biases_get_an_offset(norms: bool) -> None:
    base = tiny_llava()
    mixture = attach(base, shared=Bias(create=False, norms=norms), placement=EVERYWHERE)
    found, expected = count(mixture), biases_of(mixture.detach(), norms=norms)
    assert {site.path for site in mixture.sites} == set(expected)
    assert found == sum(expected.values())
    assert any("norm" in path for path in expected) is norms


@pytest.mark.parametrize("base", [tiny_llama, tiny_llava])
def test_a_base_without_biases_is_refused_by_name_of_the_option(base: Any) -> None:
    with pytest.raises(ValueError, match=r"Bias\(.*can sit at none of the .*q_proj: it has no bias; create=True"):
        attach(base(), shared=Bias(create=False))


def test_llava_has_as_many_biases_as_its_architecture_says() -> None:
    """CLIP ViT-L/14 of 24 blocks and a projector of two layers; the decoder has none."""
    base = llava_7b()
    block = 4 * 1024 + 4096 + 1024 + 2 * 1024
    for unread, expected in ((True, 24 * block + 2 * 1024 + 2 * 4096), (False, 23 * block + 1024 + 2 * 4096)):
        places = Placement(towers=("vision", "connector", "language"), unread=unread)
        mixture = attach(base, shared=Bias(create=False), placement=places)
        assert count(mixture) == expected
        assert {site.tower for site in mixture.sites} == {"vision", "connector"}
        base = mixture.detach()
    assert 24 * block + 2 * 1024 + 2 * 4096 == 280_576


def test_a_merge_puts_offsets_onto_biases_or_makes_some() -> None:
    mixture, batch = attach(tiny_llava(), shared=Bias(), placement=EVERYWHERE).eval(), llava_batch()
    randomize(mixture, 0.1)
    plain, _ = mixture.merge("task")
    torch.testing.assert_close(plain(**batch).logits, mixture(**batch).logits, rtol=1e-4, atol=1e-4)
    offsets = {site.path: bank.state("shared")["bias"][0] for site, bank in mixture.banks()}
    base = mixture.detach()
    made = 0
    for path, offset in offsets.items():
        before, after = base.get_submodule(path).bias, plain.get_submodule(path).bias
        made += before is None
        torch.testing.assert_close(after, offset if before is None else before + offset)
    assert made == 3 * 7


def test_offsets_are_never_decayed() -> None:
    mixture = attach(tiny_llava(), shared=Bias())
    for _, bank in mixture.banks():
        assert {name for name, _ in bank.named_parameters()} <= bank.undecayed()
