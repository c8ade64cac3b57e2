"""Which row each image belongs to, for every way in which bases lay images out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.image_rows import ImageRows, find_image_rows, image_tokens_of

IMAGE, VIDEO, TEXT = 3, 4, 9
COUNTS = [(1, 1, 1), (2, 0, 1), (0, 3, 0), (0, 0, 2), (3, 1, 2)]
"""Images of each row."""


def base_of(**config: Any) -> Any:
    vision = SimpleNamespace(spatial_merge_size=2, patch_size=8, image_size=16)
    return SimpleNamespace(
        config=SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, vision_config=vision, **config)
    )


def ids_of(tokens: list[list[int]], token: int = IMAGE) -> Tensor:
    """Rows with so many tokens for each of their images, text between and around, padded on the left."""
    rows = [[TEXT, *(each for count in own for each in [token] * count + [TEXT] * (len(own) % 2))] for own in tokens]
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


def split(lengths: list[int], counts: tuple[int, ...]) -> list[list[int]]:
    """Give each row its images' lengths."""
    left = iter(lengths)
    return [[next(left) for _ in range(count)] for count in counts]


def owners(counts: tuple[int, ...]) -> list[int]:
    return [row for row, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_images_of_one_size(counts: tuple[int, ...]) -> None:
    pixels = torch.zeros(sum(counts), 3, 16, 16)
    inputs = {"input_ids": ids_of(split([4] * sum(counts), counts)), "pixel_values": pixels}
    (found,) = find_image_rows(base_of(), inputs, 3)
    assert found.rows == tuple(owners(counts))
    assert found.one_each is (counts == (1, 1, 1))
    assert not found.packed
    windows = found.of(6 * sum(counts))
    assert windows is not None
    assert windows.tolist() == [row for row in owners(counts) for _ in range(6)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_patches_with_grids_are_packed(counts: tuple[int, ...]) -> None:
    grids = torch.tensor([[1, 2, 4], [1, 4, 2], [1, 2, 2], [1, 6, 2], [1, 2, 2], [1, 4, 4]][: sum(counts)])
    patches = grids.prod(dim=1).tolist()
    inputs = {
        "input_ids": ids_of(split([count // 4 for count in patches], counts)),
        "pixel_values": torch.zeros(sum(patches), 5),
        "image_grid_thw": grids,
    }
    (found,) = find_image_rows(base_of(), inputs, 3)
    assert found.packed
    for merged in (1, 4):
        expected = [row for row, count in zip(owners(counts), patches, strict=True) for _ in range(count // merged)]
        assert found.of(sum(patches) // merged).tolist() == expected


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_patches_of_images_of_given_sizes_are_packed(counts: tuple[int, ...], merge: int) -> None:
    sizes = torch.tensor([[16, 32], [32, 16], [16, 16], [48, 16], [16, 16], [32, 32]][: sum(counts)])
    patches = (sizes // 8).prod(dim=1).tolist()
    config = {"spatial_merge_size": merge} if merge > 1 else {}
    inputs = {
        "input_ids": ids_of(split([count // merge**2 for count in patches], counts)),
        "pixel_values": torch.zeros(sum(counts), 3, 48, 48),
        "image_sizes": sizes,
    }
    (found,) = find_image_rows(base_of(**config), inputs, 3)
    assert found.packed
    expected = [row for row, count in zip(owners(counts), patches, strict=True) for _ in range(count)]
    assert found.of(sum(patches)).tolist() == expected
    assert found.of(sum(counts)).tolist() == owners(counts)  # as their convolution sees them


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_images_on_an_axis_of_their_own_are_padded(counts: tuple[int, ...]) -> None:
    pixels = torch.zeros(3, max(counts), 3, 16, 16)
    for row, count in enumerate(counts):
        pixels[row, :count] = 1.0
    (found,) = find_image_rows(base_of(), {"input_ids": ids_of([[], [], []]), "pixel_values": pixels}, 3)
    assert found.of(sum(counts)).tolist() == owners(counts)


def test_images_with_an_axis_of_tiles_keep_their_padding() -> None:
    pixels = torch.zeros(3, 2, 4, 3, 16, 16)
    (found,) = find_image_rows(base_of(), {"input_ids": ids_of([[], [], []]), "pixel_values": pixels}, 3)
    assert found.of(6).tolist() == [0, 0, 1, 1, 2, 2]
    assert found.of(24).tolist() == [row for row in range(3) for _ in range(8)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_videos_follow_images(counts: tuple[int, ...]) -> None:
    videos = (1, 0, 1)
    ids = torch.cat([ids_of(split([4] * sum(counts), counts)), ids_of(split([8, 8], videos), VIDEO)], dim=1)
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.zeros(sum(counts), 3, 16, 16),
        "pixel_values_videos": torch.zeros(2, 5, 3, 16, 16),
    }
    images, films = find_image_rows(base_of(), inputs, 3)
    assert images.of(sum(counts)).tolist() == owners(counts)
    assert films.of(10).tolist() == [0] * 5 + [2] * 5
    del inputs["pixel_values"]
    assert find_image_rows(base_of(), inputs, 3)[0].of(10).tolist() == [0] * 5 + [2] * 5


@pytest.mark.parametrize(
    ("tokens", "images"),
    [
        ([[4], [4], [3]], 3),  # a row has fewer tokens than its image becomes
        ([[4], [4], []], 3),
        ([[6], [2], [4]], 3),  # in the sum they fit
        ([[4], [4], [4]], 2),
        ([[4], [4], [4]], 5),
    ],
    ids=str,
)
def test_images_that_do_not_fill_their_rows_have_none(tokens: list[list[int]], images: int) -> None:
    inputs = {"input_ids": ids_of(tokens), "pixel_values": torch.zeros(images, 3, 16, 16)}
    (found,) = find_image_rows(base_of(), inputs, 3)
    assert found.rows is None
    assert found.of(images) is None


def test_without_tokens_only_one_image_a_row_is_sure() -> None:
    for pixels, expected in ((3, [0, 1, 2]), (4, None)):
        inputs = {"inputs_embeds": torch.zeros(3, 5, 8), "pixel_values": torch.zeros(pixels, 3, 16, 16)}
        (found,) = find_image_rows(base_of(), inputs, 3)
        assert (None if found.rows is None else list(found.rows)) == expected


def test_entries_that_do_not_fit_have_no_rows() -> None:
    images = ImageRows((0, 1), (4, 6), packed=True)
    assert images.of(5).tolist() == [0, 0, 1, 1, 1]
    assert images.of(20).tolist() == [0] * 8 + [1] * 12
    assert [images.of(count) for count in (0, 3, 7, 9, 15)] == [None] * 5


def test_tokens_of_images_and_videos() -> None:
    assert image_tokens_of(base_of()) == (IMAGE, VIDEO)
    assert image_tokens_of(SimpleNamespace(config=SimpleNamespace(image_token_index=7))) == (7,)
    assert image_tokens_of(SimpleNamespace(config=SimpleNamespace())) == ()
