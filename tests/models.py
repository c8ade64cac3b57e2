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


def llava_7b() -> PreTrainedModel:
    """LLaVA-1.5-7B without its weights: CLIP ViT-L/14-336 and a LLaMA of 32 blocks."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


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


def padded(batch: dict[str, Tensor], amount: int, side: str, seed: int = 3) -> dict[str, Tensor]:
    """Add padding whose tokens are random, so that reading them would show.

    Args:
        batch: Rows of `llava_batch` or `prompt_of`.
        amount: How many tokens of padding.
        side: `left` or `right`.
        seed: Of the padding's tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(batch["input_ids"])
    fill = {
        "input_ids": torch.randint(5, VOCABULARY, (rows, amount), generator=generator),
        "attention_mask": torch.zeros(rows, amount, dtype=torch.long),
        "labels": torch.full((rows, amount), -100),
    }
    joined = dict(batch)
    for name in fill.keys() & batch.keys():
        pair = (fill[name], batch[name]) if side == "left" else (batch[name], fill[name])
        joined[name] = torch.cat(pair, dim=1)
    return joined


def ragged_prompts(rows: int = 3, *, seed: int = 2) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left, one image a row."""
    prompts = [rows_of(prompt_of(llava_batch(rows, prompt=3 + row, seed=seed)), row) for row in range(rows)]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    filled = [padded(prompt, longest - prompt["input_ids"].shape[1], "left") for prompt in prompts]
    return {name: torch.cat([prompt[name] for prompt in filled]) for name in filled[0]}


def rows_of(batch: dict[str, Tensor], *rows: int) -> dict[str, Tensor]:
    """Take rows out of a batch, in this order."""
    return {name: tensor[list(rows)] for name, tensor in batch.items()}


def unpadded(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Take one row out of a batch, without its padding."""
    one = rows_of(batch, row)
    real = one["attention_mask"][0].bool()
    return {name: tensor if name == "pixel_values" else tensor[:, real] for name, tensor in one.items()}


def uneven_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give row 0 of a prompt two images and row 1 none, so that as many images as rows are left."""
    ids = batch["input_ids"]
    text = ids[:, PATCHES:]
    ids = torch.stack(
        [
            torch.cat([ids[0], torch.full((PATCHES,), IMAGE_TOKEN)]),
            torch.cat([torch.zeros(2 * PATCHES, dtype=torch.long), text[1]]),
            *(torch.cat([torch.zeros(PATCHES, dtype=torch.long), row]) for row in ids[2:]),
        ]
    )
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": batch["pixel_values"]}
