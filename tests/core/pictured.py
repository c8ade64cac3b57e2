"""Batches for bases of the zoo whose rows have any number of images, of different shapes where a base takes such."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.core.zoo import build
from tests.models import IMAGE_TOKEN

SIZES = ((16, 16), (16, 32), (32, 16), (32, 32), (48, 16), (16, 16))
"""Heights and widths of images, one after the other."""
TEXT = 4
"""Tokens of text a row."""
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
GRIDS, PADDED = ("qwen2_5_vl", "qwen3_vl"), ("idefics3", "smolvlm")
TILES, PACKED = ("llava_next", "llava_onevision"), ("llava_pixtral",)
PICTURED = ("llava", "paligemma", "gemma3", "internvl", *GRIDS, *PADDED, *TILES, *PACKED, "mllama")
"""Bases whose rows may have several images, or none."""
Image = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        images: Its images.
        tokens: Its tokens: each image's as many as the base makes of it, with text around and behind.
        entries: How many entries of the vision tower's axis are each image's.
    """

    images: list[Image]
    tokens: Tensor
    entries: list[int]


def pictured(name: str) -> PreTrainedModel:
    """Build a base at sizes at which a wrong image shows."""
    base = build(name)
    if name in TILES:
        base.config.image_grid_pinpoints = base.model.config.image_grid_pinpoints = PINPOINTS  # type: ignore[union-attr]
    for parameter in base.parameters():
        if parameter.ndim > 1 or parameter.numel() == 1:  # gates would be shut
            torch.nn.init.normal_(parameter, std=0.2)
    return base


def rows_with(base: PreTrainedModel, name: str, counts: tuple[int, ...], seed: int = 0) -> list[Row]:
    """Make rows with so many images each, for a bare base."""
    generator = torch.Generator().manual_seed(seed)
    sizes = iter(SIZES * 3)
    rows = []
    for count in counts:
        images = [_image(name, next(sizes), generator) for _ in range(count)]
        text = torch.randint(5, 60, (TEXT,), generator=generator)
        counts_of = [_measure(base, name, image) for image in images]
        shown = [torch.full((tokens,), IMAGE_TOKEN) for tokens, _ in counts_of]
        ids = torch.cat([*(part for own in shown for part in (own, text[:1])), text])
        rows.append(Row(images, ids, [entries for _, entries in counts_of]))
    return rows


def batch_of(name: str, rows: list[Row]) -> dict[str, Tensor]:
    """Put rows into a batch, padded on the left."""
    texts = [row.tokens for row in rows]
    width = max(map(len, texts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(text), dtype=torch.long), text]) for text in texts])
    real = torch.stack([torch.arange(width) >= width - len(text) for text in texts])
    batch = {"input_ids": ids, "attention_mask": real.long()} | images_of(name, [row.images for row in rows])
    if name in ("paligemma", "gemma3"):
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if name in GRIDS:
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if name == "mllama" and "pixel_values" in batch:
        shown = torch.tensor([len(row.images) for row in rows])[:, None] > torch.arange(batch["pixel_values"].shape[1])
        mask = real[:, :, None, None] & shown[:, None, :, None]
        batch["cross_attention_mask"] = mask.expand(-1, -1, -1, 2).long()
    return batch


def images_of(name: str, rows: list[list[Image]]) -> dict[str, Tensor]:
    """Lay images out as a base wants them."""
    images = [image for own in rows for image in own]
    if not images:
        return {}
    pixels = [image["pixel_values"] for image in images]
    others = {key: torch.stack([image[key] for image in images]) for key in images[0] if key != "pixel_values"}
    if name in GRIDS:
        return {"pixel_values": torch.cat(pixels), **others}
    if name in PADDED or name == "mllama":
        most = max(map(len, rows))
        return {key: torch.stack([_filled(own, key, most, like) for own in rows]) for key, like in images[0].items()}
    shape = [max(pixel.shape[axis] for pixel in pixels) for axis in range(pixels[0].ndim)]
    return {"pixel_values": torch.stack([_grown(pixel, shape) for pixel in pixels]), **others}


def _image(name: str, size: tuple[int, int], generator: torch.Generator) -> Image:
    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name in GRIDS:
        height, width = size[0] // 8, size[1] // 8
        patch = 14 if name == "qwen2_5_vl" else 16
        return {
            "pixel_values": noise(height * width, 3 * 2 * patch * patch),
            "image_grid_thw": torch.tensor([1, height, width]),
        }
    if name in PACKED:
        return {"pixel_values": noise(3, *size), "image_sizes": torch.tensor(size)}
    if name in TILES:
        tiles = image_size_to_num_patches(size, PINPOINTS, 16)
        return {"pixel_values": noise(tiles, 3, 16, 16), "image_sizes": torch.tensor(size)}
    if name == "mllama":
        return {
            "pixel_values": noise(2, 3, 16, 16),
            "aspect_ratio_ids": torch.tensor(2),
            "aspect_ratio_mask": torch.tensor([1, 1]),
        }
    return {"pixel_values": noise(3, 16, 16)}


def seen_by(base: Any, run: Callable[[], Any]) -> Tensor:
    """Return what comes out of the vision tower while a base runs, its first axis that of images, tiles or patches."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output.last_hidden_state)

    handle = base.get_encoder("image").register_forward_hook(keep)
    with torch.no_grad():
        run()
    handle.remove()
    return outputs[0].squeeze(0) if base.config.vision_config.model_type == "pixtral" else outputs[0]


def _measure(base: Any, name: str, image: Image) -> tuple[int, int]:
    """Return how many tokens an image becomes, and how many entries of the vision tower's axis it takes."""
    if name == "mllama":
        return 1, 1
    features: list[Any] = []
    inputs = images_of(name, [[image]])
    seen = seen_by(base, lambda: features.append(base.get_image_features(**inputs).pooler_output))
    found = features[0] if isinstance(features[0], Tensor) else torch.cat(list(features[0]))
    return found.numel() // found.shape[-1], len(seen)


def _filled(images: list[Image], key: str, count: int, like: Tensor) -> Tensor:
    """Stack what images have, with zeros up to a number."""
    own = [image[key] for image in images]
    return torch.stack([*own, *[torch.zeros_like(like)] * (count - len(own))])


def _grown(tensor: Tensor, shape: list[int]) -> Tensor:
    found = tensor.new_zeros(shape)
    found[tuple(slice(length) for length in tensor.shape)] = tensor
    return found
