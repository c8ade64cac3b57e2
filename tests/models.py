"""Tiny random models of real transformers classes, built from configs, and batches for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

VOCABULARY = 67
IMAGE_TOKEN = 3
PATCHES = 4
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama() -> PreTrainedModel:
    """A Llama of three blocks."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_TEXT)).eval()


def tiny_llava() -> PreTrainedModel:
    """A LLaVA of four vision blocks, the last of which is not read, and three language blocks."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_TEXT),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # sizes at which a wrong row or token shows
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def llava_batch(rows: int = 3, *, prompt: int = 5, answer: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """One image a row, a prompt and an answer with labels on the answer only.

    Args:
        rows: B.
        prompt: Text tokens of the prompt.
        answer: Tokens of the answer.
        seed: Of tokens and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, VOCABULARY, (rows, prompt + answer), generator=generator)
    ids = torch.cat([torch.full((rows, PATCHES), IMAGE_TOKEN), text], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, PATCHES + prompt :] = text[:, prompt:]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
        "labels": labels,
    }


def prompt_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the answers off a batch."""
    length = int((batch["labels"] == -100).all(dim=0).sum())
    return {
        "input_ids": batch["input_ids"][:, :length],
        "attention_mask": batch["attention_mask"][:, :length],
        "pixel_values": batch["pixel_values"],
    }


def randomize(mixture: Any, scale: float = 0.3) -> None:
    """Give every adapter and router weights that matter, as training would."""
    generator = torch.Generator().manual_seed(7)
    for _, parameter in mixture.named_adapter_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
