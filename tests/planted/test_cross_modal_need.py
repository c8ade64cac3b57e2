"""Planted need: gates open where the answer hangs on the image, and stay shut where the text tells it.

A tiny frozen LLaVA whose language blocks carry nothing from token to token, as the output of their attention is zero:
what stands at the last token of the question depends on that token alone. It is one of two words, the picture one of
two pictures with noise, and the answer is told by the picture, by the word, or by whether both bits differ (XOR). LoRA
on the MLPs, shared, can learn the second case and not the others; an expert of `CrossModal` at the entry brings the
picture to the word. Without it, accuracy is one half, 1 and one half; with it all three are learned. Gates learn faster
than the maps behind them, so that they show how much is let through, and start slowly, so that LoRA is first where it
can do it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moadapt import Mixture, Placement, attach
from moadapt.adapters import CrossModal, LoRA
from moadapt_routers import Constant
from tests.models import IMAGE_TOKEN, PATCHES, tiny_llava

ANSWERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "image": lambda picture, word: picture,
    "text": lambda picture, word: word,
    "xor": lambda picture, word: picture ^ word,
}
STEPS, ROWS, NOISE, WARM = 200, 32, 0.6, 50
YES, WORD = 7, 5


def examples(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Which picture and which word every row has, and the base's inputs."""
    picture, word = torch.randint(2, (2, rows), generator=generator)
    clean = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(100))
    noise = NOISE * torch.randn(rows, 3, 16, 16, generator=generator)
    ids = torch.randint(10, 60, (rows, PATCHES + 3), generator=generator)
    ids[:, :PATCHES], ids[:, -1] = IMAGE_TOKEN, WORD + word
    return picture, word, {"input_ids": ids, "pixel_values": clean[picture] + noise}


def mixture_of(*, crossing: bool) -> Mixture:
    base = tiny_llava()
    for block in base.model.language_model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    experts = {"cross": CrossModal(rank=4, placement=Placement(kinds=("entry",)))} if crossing else None
    shared = LoRA(rank=4, placement=Placement(kinds=("mlp",)))
    return attach(base, shared=shared, experts=experts, router=Constant() if crossing else None)


def scores(mixture: Mixture, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the two answers, (B, 2)."""
    found: Tensor = mixture(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1, YES : YES + 2]
    return found


def train(mixture: Mixture, answer: Callable[[Tensor, Tensor], Tensor], seed: int) -> None:
    rates = {"gate": 2e-2, "map": 3e-3, "lora": 2e-2}
    groups: dict[str, list[Tensor]] = {name: [] for name in rates}
    for name, parameter in mixture.named_adapter_parameters():
        groups["gate" if name.endswith("_gate") else "map" if "_to_" in name else "lora"].append(parameter)
    optimizer = torch.optim.AdamW([{"params": each} for each in groups.values() if each], weight_decay=0.0)
    chosen = [name for name, each in groups.items() if each]
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        warm = min(1.0, (step + 1) / WARM)
        for name, group in zip(chosen, optimizer.param_groups, strict=True):
            group["lr"] = rates[name] * (1.0 if name == "lora" else warm)
        picture, word, inputs = examples(generator, ROWS)
        optimizer.zero_grad()
        functional.cross_entropy(scores(mixture, inputs), answer(picture, word)).backward()
        optimizer.step()


def outcome(kind: str, seed: int, *, crossing: bool) -> tuple[float, float]:
    """Accuracy on fresh rows, and |tanh g| of what text reads of the image."""
    torch.manual_seed(seed)
    mixture = mixture_of(crossing=crossing).train()
    train(mixture, ANSWERS[kind], seed)
    picture, word, inputs = examples(torch.Generator().manual_seed(1000 + seed), 1000)
    with torch.no_grad():
        right = scores(mixture.eval(), inputs).argmax(-1) == ANSWERS[kind](picture, word)
    gates = [bank.readings().get("gate/cross/image_to_text", 0.0) for _, bank in mixture.banks()]
    return float(right.float().mean()), max(gates)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ANSWERS)
def test_gates_open_only_where_the_image_is_needed(kind: str, seed: int) -> None:
    without, _ = outcome(kind, seed, crossing=False)
    found, gate = outcome(kind, seed, crossing=True)
    print(f"{kind}, seed {seed}: accuracy without {without:.3f}, with {found:.3f}, |tanh g| {gate:.3f}")
    assert found >= 0.97
    if kind == "text":
        assert without >= 0.99
        assert gate < 0.05
    else:
        assert abs(without - 0.5) < 0.06
        assert gate > 0.5
