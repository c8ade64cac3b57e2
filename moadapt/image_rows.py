"""Which row of a call each image belongs to, in the towers whose first axis counts images, tiles or patches.

Bases lay images out in five ways. They stack them, or tiles of one size, and give all of them equally many tokens; pad
the images of every row to one number, on an axis of their own; cut each image into as many tiles as its shape asks for;
or pack the patches of all images into one axis, with their grids or their sizes beside them. Where the layout does not
name rows, images go to rows in order, each taking as many of its row's image tokens as it becomes.

Axes: B rows, N images.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches


@dataclass(frozen=True)
class ImageRows:
    """Which row each image of one run of the vision tower belongs to.

    Args:
        rows: Row of each image, in the order in which the tower gets them, N numbers; None where they cannot be told.
        lengths: How many entries of the tower's axis are each image's: tiles, frames or patches, N numbers.
        packed: Whether the entries are patches, all of them in one axis, and not images with patches of their own.
        padded: Whether some images only fill up rows, and run all the same.
    """

    rows: tuple[int, ...] | None
    lengths: tuple[int, ...]
    packed: bool = False
    padded: bool = False

    @cached_property
    def one_each(self) -> bool:
        """Whether row b has image b and no other, and that is entry b."""
        return not self.packed and self.rows == tuple(range(len(self.lengths))) and set(self.lengths) == {1}

    def of(self, count: int) -> Tensor | None:
        """Return the row of each of so many entries, (count,), on the CPU; None where they cannot be told.

        Where there are more or fewer than the tower has, each was cut into windows, or neighbours were merged, equally
        many in all images.

        Args:
            count: Length of the axis.
        """
        total = sum(self.lengths)
        if self.rows is None or not count or not total:
            return None
        if count % total == 0:
            lengths = [length * (count // total) for length in self.lengths]
        elif total % count == 0 and not any(length % (total // count) for length in self.lengths):
            lengths = [length // (total // count) for length in self.lengths]
        elif count == len(self.lengths):
            lengths = [1] * count
        else:
            return None
        return torch.tensor(self.rows).repeat_interleave(torch.tensor(lengths), output_size=count)


def image_tokens_of(base: PreTrainedModel) -> tuple[int, ...]:
    """Return the token ids that stand for patches of images and videos, as far as a base has such.

    Args:
        base: Any transformers model.
    """
    found = [_token_of(base, kind) for kind in ("image", "video")]
    return tuple(dict.fromkeys(token for token in found if token is not None))


_KEYS = {
    "image": ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
"""Inputs that have an entry an image, or several, first their pixels."""


def find_image_rows(base: PreTrainedModel, inputs: Mapping[str, Any], num_rows: int) -> tuple[ImageRows, ...]:
    """Find the rows of a call's images and videos, for each run of the vision tower in its order.

    Args:
        base: Any transformers model with images.
        inputs: What it was called with.
        num_rows: B.

    Returns:
        The images', then the videos', of those that there are.
    """
    found = []
    for kind, pixels, find in (("image", "pixel_values", _images), ("video", "pixel_values_videos", _videos)):
        if inputs.get(pixels) is not None:
            counts = _counts(inputs.get("input_ids"), _token_of(base, kind))
            found.append(find(base, inputs, inputs[pixels], counts, num_rows))
    return tuple(found)


def take_rows(base: PreTrainedModel, inputs: Mapping[str, Any], rows: Sequence[int], num_rows: int) -> dict[str, Any]:
    """Take rows out of a batch, with their images, in the order in which they stand.

    Args:
        base: Any transformers model.
        inputs: What it takes.
        rows: Which rows, ascending.
        num_rows: B.

    Raises:
        ValueError: The images' rows cannot be told.
    """
    taken, left = dict[str, Any](), dict(inputs)
    given = [keys for keys in _KEYS.values() if inputs.get(keys[0]) is not None]
    for keys, found in zip(given, find_image_rows(base, inputs, num_rows), strict=True):
        if found.rows is None:
            raise ValueError(
                f"which of the {num_rows} rows have which images cannot be told, so that none can be taken out; give "
                "input_ids whose image tokens are those of the images, in order, or batches of one task each"
            )
        chosen = [image for image, row in enumerate(found.rows) if row in rows]
        by_row = inputs[keys[0]].ndim > 4 and inputs.get("image_sizes") is None and len(inputs[keys[0]]) == num_rows
        for name in keys if not (by_row and chosen) else ():
            value = left.pop(name, None)
            if value is not None and chosen:
                each = chosen if len(value) == len(found.lengths) else _entries(found.lengths, chosen)
                taken[name] = value[torch.tensor(each, device=value.device)]
    for name, value in left.items():
        taken[name] = value[torch.tensor(rows, device=value.device)] if _of_rows(value, num_rows) else value
    return taken


def _entries(lengths: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Return which entries of an axis are those of some images, each having several one after the other."""
    ends = list(accumulate(lengths))
    return [at for image in chosen for at in range(ends[image] - lengths[image], ends[image])]


def _of_rows(value: Any, num_rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == num_rows


def _images(
    base: PreTrainedModel, inputs: Mapping[str, Any], pixels: Tensor, counts: list[int] | None, num_rows: int
) -> ImageRows:
    sizes = inputs.get("image_sizes")
    if inputs.get("image_grid_thw") is not None:
        return _of_grids(base, inputs["image_grid_thw"], counts)
    if sizes is not None and hasattr(getattr(base, "model", base), "pack_image_features"):
        return _of_tiles(base, torch.as_tensor(sizes), inputs.get("batch_num_images"), counts)
    if sizes is not None:
        return _of_sizes(base, torch.as_tensor(sizes), counts)
    if pixels.ndim > 4:
        return _padded(pixels, num_rows, inputs.get("aspect_ratio_ids"))
    return _alike(len(pixels), 1, counts, num_rows)


def _videos(
    base: PreTrainedModel, inputs: Mapping[str, Any], pixels: Tensor, counts: list[int] | None, num_rows: int
) -> ImageRows:
    if inputs.get("video_grid_thw") is not None:
        return _of_grids(base, inputs["video_grid_thw"], counts)
    return _alike(len(pixels), pixels.shape[1], counts, num_rows)


def _token_of(base: PreTrainedModel, kind: str) -> int | None:
    found: int | None = getattr(base.config, f"{kind}_token_id", getattr(base.config, f"{kind}_token_index", None))
    return found


def _counts(ids: Tensor | None, token: int | None) -> list[int] | None:
    """Count the tokens of each row that stand for patches; None where they cannot be told."""
    if ids is None or token is None:
        return None
    counts: list[int] = (ids == token).sum(dim=1).tolist()
    return counts


def _padded(pixels: Tensor, num_rows: int, shapes: Tensor | None) -> ImageRows:
    """Images (B, n, C, H, W), of which those of zeros alone are padding, or (B, n, tiles, C, H, W), which all run."""
    own = len(pixels) == num_rows
    if pixels.ndim > 5:
        filled = shapes is not None and bool((shapes == 0).any())  # the shape of no picture
        rows = tuple(range(num_rows)) if own else None
        return ImageRows(rows, (pixels.shape[1],) * num_rows, padded=filled)
    rows = tuple((pixels != 0).flatten(2).any(dim=2).nonzero()[:, 0].tolist())
    return ImageRows(rows if own else None, (1,) * len(rows))


def _alike(images: int, length: int, counts: list[int] | None, num_rows: int) -> ImageRows:
    """Images, tiles or videos of one size, which become equally many tokens."""
    if counts is None or not sum(counts):  # no token stands for them
        rows = tuple(range(num_rows)) if images == num_rows else None
    else:
        each, rest = divmod(sum(counts), images)
        rows = None if rest else _in_order([each] * images, counts)
    return ImageRows(rows, (length,) * images)


def _of_grids(base: PreTrainedModel, grids: Tensor, counts: list[int] | None) -> ImageRows:
    """Packed patches with a grid (time, height, width) an image, of which squares are merged."""
    patches = grids.prod(dim=1).tolist()
    merged = base.config.vision_config.spatial_merge_size**2
    rows = None if counts is None else _in_order([count // merged for count in patches], counts)
    return ImageRows(rows, tuple(patches), packed=True)


def _of_sizes(base: PreTrainedModel, sizes: Tensor, counts: list[int] | None) -> ImageRows:
    """Packed patches of images of given heights and widths, of which squares may be merged."""
    config = base.config
    grids = sizes // config.vision_config.patch_size
    tokens = (grids // getattr(config, "spatial_merge_size", 1)).prod(dim=1).tolist()
    rows = None if counts is None else _in_order(tokens, counts)
    return ImageRows(rows, tuple(grids.prod(dim=1).tolist()), packed=True)


def _of_tiles(base: PreTrainedModel, sizes: Tensor, per_row: Any, counts: list[int] | None) -> ImageRows:
    """Tiles, as many as an image's shape asks for, but one where its row has several images and the base says so."""
    config, model = base.config, getattr(base, "model", base)
    vision = config.vision_config
    alone = [True] * len(sizes) if per_row is None else [int(n) == 1 for n in per_row for _ in range(int(n))]
    tiles = tuple(
        image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size) if cut else 1
        for size, cut in zip(sizes.tolist(), alone, strict=True)
    )
    if counts is None:
        return ImageRows(None, tiles)
    patches = (vision.image_size // vision.patch_size) ** 2  # a base packs stand-ins as it packs features
    packed = _pack(model, [torch.zeros(count, patches, 1) for count in tiles], sizes.cpu())
    rows = _in_order(packed, counts)
    return ImageRows(rows, tiles)


def _pack(model: Any, features: list[Tensor], sizes: Tensor) -> list[int]:
    """Ask a base into how many tokens it packs the tiles of each image."""
    known = inspect.signature(model.pack_image_features).parameters
    settings = ("vision_feature_select_strategy", "vision_aspect_ratio")
    given = {name: getattr(model.config, name) for name in settings if name in known}
    _, lengths = model.pack_image_features(features, sizes, image_newline=torch.zeros(1), **given)
    counts: list[int] = lengths.tolist()
    return counts


def _in_order(tokens: Sequence[int], counts: Sequence[int]) -> tuple[int, ...] | None:
    """Give images to rows in order, by how many tokens each becomes; None where they do not fill the rows exactly.

    Args:
        tokens: Of each image, N numbers above 0.
        counts: Image tokens of each row, B numbers.
    """
    left, rows = iter(tokens), list[int]()
    for row, missing in enumerate(counts):
        while missing > 0:
            missing -= next(left, missing + 1)
            rows.append(row)
        if missing:
            return None
    return tuple(rows) if next(left, None) is None else None
