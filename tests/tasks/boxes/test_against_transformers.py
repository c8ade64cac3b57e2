"""Conventions and views equal what transformers does with the same boxes and pictures."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor
from transformers.models.kosmos2.processing_kosmos2 import (
    clean_text_and_extract_entities_with_bboxes,
    coordinate_to_patch_index,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from moadapt_tasks.boxes import CannotWrite, View
from moadapt_tasks.boxes.florence2 import Florence2Boxes
from moadapt_tasks.boxes.kosmos2 import Kosmos2Boxes
from moadapt_tasks.boxes.paligemma import PaliGemmaBoxes
from moadapt_tasks.boxes.smart_resize import SmartResize, smart_size
from moadapt_tasks.boxes.views import CentreCrop, PaddedSquare, WholePicture
from tests.tasks.boxes.drawing import near, some_boxes

SIZE = (640, 480)
BOXES = some_boxes((0, 0, *SIZE), (41, 31), 200)
"""Wider and higher than two of Kosmos-2's cells."""
LIMITS = [(28, 3136, 12845056), (28, 3136, 1003520), (32, 65536, 16777216), (28, 784, 784), (1, 1, 10)]


@pytest.mark.parametrize(("factor", "least", "most"), LIMITS)
def test_smart_size_equals_transformers(factor: int, least: int, most: int) -> None:
    source = random.Random(factor + most)
    sizes = [(1, 1), (1, 200), (200, 1), (14, 14), (13, 2600), (42, 70), (10000, 10000)]
    sizes += [(source.randint(1, 5000), source.randint(1, 5000)) for _ in range(3000)]
    for width, height in sizes:
        if max(width, height) <= 200 * min(width, height):
            wanted = smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
            assert smart_size((width, height), factor, least, most) == wanted[::-1], (width, height)


def test_both_refuse_a_picture_over_two_hundred_times_longer_than_wide() -> None:
    for size in ((201, 1), (1, 201), (4001, 20)):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(size[1], size[0])
        with pytest.raises(
            CannotWrite, match=rf"the picture is {size[0]} by {size[1]} pixels, and the processor takes"
        ):
            SmartResize().frame(size)
    assert SmartResize().frame((4000, 20)).size == smart_resize(20, 4000)[::-1]


def ramp(size: tuple[int, int]) -> Image.Image:
    """A picture whose first two channels say where a pixel is, 55 to 255 from left to right and from top to bottom."""
    across, down = (np.linspace(55, 255, side, dtype=np.float32) for side in size)
    channels = [np.broadcast_to(across, size[::-1]), np.broadcast_to(down[:, None], size[::-1])]
    return Image.fromarray(np.stack([*channels, channels[0]], axis=-1).round().astype(np.uint8))


def shown(processor: Any, size: tuple[int, int]) -> list[np.ndarray[Any, Any]]:
    """Return where the columns and the rows that a processor shows lie, in fractions of the picture's sides."""
    pixels = processor(ramp(size), return_tensors="np")["pixel_values"][0]
    return [
        (pixels[axis].max(axis=axis) - 55) / 200 for axis in (0, 1)
    ]  # the largest value is no padding, which is black


PLAIN = {"do_normalize": False, "do_rescale": False, "resample": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (400, 400), (900, 200), (211, 640)], ids=str)
@pytest.mark.parametrize(
    ("view", "processor"),
    [
        (
            CentreCrop(shortest=112, crop=112),
            CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}, **PLAIN),
        ),
        (
            CentreCrop(shortest=128, crop=99),
            LlavaImageProcessorPil(size={"shortest_edge": 128}, crop_size={"height": 99, "width": 99}, **PLAIN),
        ),
        (
            WholePicture(),
            CLIPImageProcessorPil(size={"height": 112, "width": 112}, do_center_crop=False, **PLAIN),
        ),
        (
            PaddedSquare(),
            LlavaImageProcessorPil(
                do_pad=True, image_mean=[0, 0, 0], size={"height": 112, "width": 112}, do_center_crop=False, **PLAIN
            ),
        ),
    ],
    ids=["crop", "smaller crop", "whole", "padded"],
)
def test_view_is_what_the_processor_shows(view: View, processor: Any, size: tuple[int, int]) -> None:
    """Columns and rows of the picture are where the frame says, to two pixels of what is shown."""
    box = view.frame(size).box
    for axis, places in enumerate(shown(processor, size)):
        low, high = box[axis] / size[axis], box[axis + 2] / size[axis]
        wanted = low + (np.arange(len(places)) + 0.5) / len(places) * (high - low)
        inside = (wanted > 0.05) & (wanted < 0.95)
        assert np.abs(places - wanted)[inside].max() < 2 * (high - low) / len(places) + 1 / 200


def test_smart_resize_is_what_the_processor_shows() -> None:
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 200704})
    for size in ((640, 480), (2000, 30), (20, 20), (1999, 1777)):
        grid = processor(ramp(size), return_tensors="np")["image_grid_thw"][0]
        assert SmartResize(max_pixels=200704).frame(size).size == (grid[2] * 14, grid[1] * 14)


def test_florence_tokens_are_its_post_processors() -> None:
    post = Florence2PostProcessor.__new__(Florence2PostProcessor)
    post.quantize_bins = (1000, 1000)
    wanted = post.quantize(torch.tensor(BOXES, dtype=torch.float64), SIZE)
    for box, bins in zip(BOXES, wanted.tolist(), strict=True):
        near = Florence2Boxes().write([box], SIZE, "cat")
        for token, bin, edge, side in zip(near.split("<loc_")[1:], bins, box, SIZE * 2, strict=True):
            on_border = abs(edge / side * 1000 - round(edge / side * 1000)) < 1e-9
            assert int(token.rstrip(">")) == bin or on_border


def test_florence_boxes_are_its_post_processors_to_a_pixel() -> None:
    post = Florence2PostProcessor.__new__(Florence2PostProcessor)
    post.quantize_bins, post.banned_grounding_tokens = (1000, 1000), []
    for parse in (
        post.parse_phrase_grounding_from_text_and_spans,
        post.parse_description_with_bboxes_from_text_and_spans,
    ):
        text = Florence2Boxes().write(BOXES[:3], SIZE, "a cat")
        found = parse(text, image_size=SIZE)
        assert {each["cat_name"] for each in found} == {"a cat"}
        theirs = found[0]["bbox"] if len(found) == 1 else [each["bbox"] for each in found]
        ours = Florence2Boxes().read(text, SIZE)
        assert ours is not None
        assert theirs == [[int(edge + 1e-4) for edge in box] for box in ours]


def test_kosmos_cells_and_boxes_are_its_processors() -> None:
    for box in BOXES:
        fractions = (box[0] / SIZE[0], box[1] / SIZE[1], box[2] / SIZE[0], box[3] / SIZE[1])
        first, last = coordinate_to_patch_index(fractions, 32)
        text = Kosmos2Boxes().write([box], SIZE, "a cat")
        assert text == f"<phrase>a cat</phrase><object><patch_index_{first:04d}><patch_index_{last:04d}></object>"
        words, entities = clean_text_and_extract_entities_with_bboxes(text)
        assert (words, entities[0][0]) == ("a cat", "a cat")
        theirs = [edge * side for edge, side in zip(entities[0][2][0], SIZE * 2, strict=True)]
        found = Kosmos2Boxes().read(text, SIZE)
        assert found is not None
        assert found[0] == pytest.approx(theirs)


def test_kosmos_reads_several_boxes_as_its_processor() -> None:
    text = Kosmos2Boxes().write(BOXES[:3], SIZE, "cats")
    _, entities = clean_text_and_extract_entities_with_bboxes(text)
    theirs = [tuple(edge * side for edge, side in zip(box, SIZE * 2, strict=True)) for box in entities[0][2]]
    assert Kosmos2Boxes().read(text, SIZE) == near(theirs)


@pytest.mark.parametrize(
    "box", [(100, 100, 101, 101), (100, 20, 105, 400), (20, 100, 600, 100.5), (620, 460, 640, 480)]
)
def test_kosmos_reads_a_side_within_one_cell_as_the_cell(box: tuple[float, float, float, float]) -> None:
    """Such a side comes back within a whole cell of 20 by 15 pixels, another one within half."""
    text = Kosmos2Boxes().write([box], SIZE, "cat")
    fractions = (box[0] / SIZE[0], box[1] / SIZE[1], box[2] / SIZE[0], box[3] / SIZE[1])
    assert f"{coordinate_to_patch_index(fractions, 32)[1]:04d}" in text
    found = Kosmos2Boxes().read(text, SIZE)
    assert found is not None
    for axis, cell in enumerate((20, 15)):
        within_one = box[axis] // cell == -(-box[axis + 2] // cell) - 1
        for edge in (axis, axis + 2):
            assert abs(found[0][edge] - box[edge]) <= (cell if within_one else cell / 2)
        assert not within_one or (found[0][axis], found[0][axis + 2]) == pytest.approx(
            (box[axis] // cell * cell, box[axis] // cell * cell + cell)
        )


def test_every_paligemma_token_is_in_its_vocabulary() -> None:
    tokens = {token for token in EXTRA_TOKENS if token.startswith("<loc")}
    assert len(tokens) == 1024
    for box in [*BOXES, (0.0, 0.0, 640.0, 480.0)]:
        text = PaliGemmaBoxes().write([box], SIZE, "")
        assert {f"<loc{part}" for part in text.split("<loc")[1:]} <= tokens
