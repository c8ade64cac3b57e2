"""Adapters as the peft library saves them, on tiny bases, with weights that matter."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.core.zoo import batch_of, build
from tests.models import llava_batch, tiny_llama, tiny_llava


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=67, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def _text(rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(5, 67, (rows, 9), generator=generator)}


BASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], dict[str, Tensor]]]] = {
    "llama": (tiny_llama, _text),
    "llava": (tiny_llava, llava_batch),
    "gpt2": (gpt2, _text),
    "bert": (lambda: build("bert"), lambda: batch_of("bert")),
    "vit": (lambda: build("vit"), lambda: batch_of("vit")),
}


def saved(folder: Path, base: PreTrainedModel, *, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """Save a LoRA of peft with random weights, which training would have left.

    Args:
        folder: Where.
        base: Changed by it, so give one that is used for nothing else.
        dtype: Of the adapter's tensors; None leaves float32.
        options: Of `peft.LoraConfig`.
    """
    with quiet():
        model = peft.get_peft_model(base, peft.LoraConfig(**options))
        disturb(model)
        if dtype is not None:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        model.save_pretrained(str(folder))
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Let peft warn of what these tests do on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def disturb(model: Any, scale: float = 0.1) -> None:
    """Move everything that trains."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * scale


def outputs(model: Any, batch: dict[str, Tensor], **how: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch, **how).logits
    return found


def by_peft(folder: Path, base: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return what the peft library makes of a folder."""
    with quiet():
        return outputs(peft.PeftModel.from_pretrained(base, str(folder)).eval(), batch)
