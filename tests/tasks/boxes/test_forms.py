"""Every convention's own text, word for word, and what its models make of it that is not quite so."""

import json

import pytest

from moadapt.registry import CODECS
from moadapt_tasks.boxes import Box, BoxCodec, CannotWrite
from moadapt_tasks.boxes.qwen2_5_vl import Qwen25VLBoxes
from moadapt_tasks.boxes.shikra import ShikraBoxes
from moadapt_tasks.boxes.views import WholePicture
from tests.tasks.boxes.drawing import near

SIZE = (1000, 500)
CAT: Box = (100.0, 200.0, 500.0, 400.0)
"""0.1, 0.4, 0.5, 0.8 of the sides."""
DOG: Box = (250.0, 0.0, 1000.0, 500.0)
"""0.25, 0, 1, 1 of them."""


def codec_of(name: str) -> BoxCodec:
    found: BoxCodec = CODECS.get(name)()
    return found


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("integers", "[100, 400, 500, 799]", "[100, 400, 500, 799], [250, 0, 999, 999]"),
        (
            "internvl",
            "<ref>cat</ref><box>[[100, 400, 500, 800]]</box>",
            "<ref>cat</ref><box>[[100, 400, 500, 800], [250, 0, 1000, 1000]]</box>",
        ),
        (
            "qwen3_vl",
            '```json\n[\n\t{"bbox_2d": [100, 400, 500, 800], "label": "cat"}\n]\n```',
            '```json\n[\n\t{"bbox_2d": [100, 400, 500, 800], "label": "cat"},\n'
            '\t{"bbox_2d": [250, 0, 1000, 1000], "label": "cat"}\n]\n```',
        ),
        (  # 1000 by 500 is shown as 1008 by 504
            "qwen2_5_vl",
            '```json\n[\n\t{"bbox_2d": [101, 202, 504, 403], "label": "cat"}\n]\n```',
            '```json\n[\n\t{"bbox_2d": [101, 202, 504, 403], "label": "cat"},\n'
            '\t{"bbox_2d": [252, 0, 1008, 504], "label": "cat"}\n]\n```',
        ),
        (  # 102.3, 409.2, 511.5, 818.4 of 1023; an exact half goes to the even number
            "paligemma",
            "<loc0409><loc0102><loc0818><loc0512> cat",
            "<loc0409><loc0102><loc0818><loc0512> cat ; <loc0000><loc0256><loc1023><loc1023> cat",
        ),
        (
            "florence2",
            "cat<loc_100><loc_400><loc_500><loc_800>",
            "cat<loc_100><loc_400><loc_500><loc_800><loc_250><loc_0><loc_999><loc_999>",
        ),
        (  # padded to 1000 by 1000 with 250 above
            "shikra",
            "[0.100,0.450,0.500,0.650]",
            "[0.100,0.450,0.500,0.650;0.250,0.250,1.000,0.750]",
        ),
        (  # columns 3 to 15, rows 12 to 25 of 32; the second one from column 8
            "kosmos2",
            "<phrase>cat</phrase><object><patch_index_0387><patch_index_0815></object>",
            "<phrase>cat</phrase><object><patch_index_0387><patch_index_0815></delimiter_of_multi_objects/>"
            "<patch_index_0008><patch_index_1023></object>",
        ),
    ],
)
def test_form_is_the_published_one(name: str, one: str, two: str) -> None:
    assert codec_of(name).write([CAT], SIZE, "cat") == one
    assert codec_of(name).write([CAT, DOG], SIZE, "cat") == two


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_writes_json_whatever_the_label(name: str) -> None:
    label = 'the "red" {hat}\n\\ <b>'
    text = codec_of(name).write([CAT, DOG], SIZE, label)
    listed = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    assert [each["label"] for each in listed] == [label, label]
    assert json.loads(codec_of(name).write([], SIZE, label).strip("`json\n")) == []


@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        ("integers", "[500, 799, 100, 400]"),
        ("integers", "[500, 400, 100, 799]"),
        ("internvl", "<ref>cat</ref><box>[[500, 800, 100, 400]]</box>"),
        ("qwen3_vl", '{"bbox_2d": [100, 800, 500, 400]}'),
        ("qwen2_5_vl", '{"bbox_2d": [504, 403, 101, 202]}'),
        ("paligemma", "<loc0818><loc0512><loc0409><loc0102> cat"),
        ("florence2", "cat<loc_500><loc_400><loc_100><loc_800>"),
        ("shikra", "[0.5,0.65,0.1,0.45]"),
        ("kosmos2", "<object><patch_index_0815><patch_index_0387></object>"),
        ("kosmos2", "<object><patch_index_0399><patch_index_0803></object>"),  # upper right and lower left
    ],
)
def test_swapped_corners_are_put_in_order(name: str, swapped: str) -> None:
    codec = codec_of(name)
    assert codec.read(swapped, SIZE) == near(codec.read(codec.write([CAT], SIZE, "cat"), SIZE))


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("integers", "[-20, 1, 1200, 99999]", (0, 500 / 999, 1000, 500)),
        ("internvl", "[[0, 500, 1001, 2000]]", (0, 250, 1000, 500)),
        ("qwen3_vl", '{"bbox_2d": [500, -1, 1010, 500]}', (500, 0, 1000, 250)),
        ("qwen2_5_vl", '{"bbox_2d": [504, 252, 1020, 600]}', (500, 250, 1000, 500)),
        ("paligemma", "<loc0000><loc0000><loc1024><loc9999>", (0, 0, 1000, 500)),
        ("florence2", "<loc_0><loc_0><loc_1000><loc_5000>", (0.5, 0.25, 1000, 500)),
        ("shikra", "[-0.1,0.5,1.2,0.9]", (0, 250, 1000, 500)),  # 0.9 of the square lies in the padding
        ("kosmos2", "<patch_index_0000><patch_index_9999>", (15.625, 7.8125, 484.375, 500)),  # column 15, below row 31
    ],
)
def test_numbers_out_of_range_are_cut_to_the_picture(name: str, text: str, wanted: Box) -> None:
    found = codec_of(name).read(text, SIZE)
    assert found is not None
    assert found[0] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("integers", "[30, 40, 30, 400]"),
        ("integers", "[1000, 0, 1200, 500]"),  # wholly outside
        ("qwen3_vl", '{"bbox_2d": [0, 0, 0, 0]}'),
        ("paligemma", "<loc0001><loc0001><loc0009>"),
        ("paligemma", "<loc001><loc001><loc009><loc009>"),
        ("paligemma", "<loc0001><loc0001>, <loc0009><loc0009>"),
        ("paligemma", "<loc_1><loc_1><loc_9><loc_9>"),
        ("paligemma", "<loc0009><loc0001><loc0009><loc0005>"),  # no height
        ("florence2", "<loc0001><loc0001><loc0009><loc0009>"),
        ("florence2", "cat<loc_1><loc_1><loc_9>"),
        ("shikra", "[0.5,0.0,0.9,0.2]"),  # wholly within the padding
        ("kosmos2", "<patch_index_0001>"),
        ("kosmos2", "<patch_index_0001>, <patch_index_0100>"),
    ],
)
def test_what_is_no_box_is_read_as_nothing(name: str, text: str) -> None:
    assert codec_of(name).read(text, SIZE) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("paligemma", "<loc0409> <loc0102>\n<loc0818><loc0512> cat ; <loc0000><loc0256><loc1023><loc1023>"),
        ("paligemma", "<loc0409><loc0102><loc0818><loc0512><loc0000><loc0256><loc1023><loc1023><loc0001><loc0002>"),
        ("florence2", "</s><s>cat<loc_100><loc_400><loc_500><loc_800> dog <loc_250><loc_0><loc_999><loc_999></s>"),
        ("florence2", "<loc_100><loc_400><loc_500><loc_800><loc_250><loc_0><loc_999><loc_999><loc_1>"),
        ("kosmos2", "<object> <patch_index_0387> <patch_index_0815> <patch_index_0008><patch_index_1023>"),
        ("kosmos2", "<phrase>a</phrase><object><patch_index_387><patch_index_815></object> and <phrase>b</phrase>"
                    "<object><patch_index_0008><patch_index_1023><patch_index_0001>"),
    ],
)  # fmt: skip
def test_runs_of_tokens_are_read_box_by_box(name: str, text: str) -> None:
    codec = codec_of(name)
    assert codec.read(text, SIZE) == near(codec.read(codec.write([CAT, DOG], SIZE, "cat"), SIZE))


@pytest.mark.parametrize(
    ("name", "label"),
    [("paligemma", "a ; b"), ("paligemma", "a<b"), ("florence2", "<od>"), ("internvl", "</ref>"), ("kosmos2", "a > b")],
)
def test_a_label_with_a_mark_is_refused(name: str, label: str) -> None:
    with pytest.raises(CannotWrite, match=r"the label '.*' holds one of '.*', which mark boxes; take it out"):
        codec_of(name).write([CAT], SIZE, label)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_label_that_reads_as_a_box_is_refused(name: str) -> None:
    with pytest.raises(CannotWrite, match=r"the label 'at \[1, 2, 30, 40\]' reads as a box; take the numbers out"):
        codec_of(name).write([CAT], SIZE, "at [1, 2, 30, 40]")


@pytest.mark.parametrize("name", ["integers", "qwen2_5_vl", "qwen3_vl", "internvl", "paligemma", "florence2", "shikra"])
def test_a_box_within_one_step_is_refused(name: str) -> None:
    with pytest.raises(CannotWrite, match=r"a box is too small: .* has one without area; leave it out"):
        codec_of(name).write([CAT, (100.3, 200, 100.4, 400)], SIZE, "cat")


def test_pixels_of_the_picture_itself_are_a_view_of_qwen() -> None:
    codec = Qwen25VLBoxes(view=WholePicture())
    assert codec.write([CAT], SIZE, "cat") == '```json\n[\n\t{"bbox_2d": [100, 200, 500, 400], "label": "cat"}\n]\n```'


def test_shikra_writes_as_many_digits_as_it_is_told() -> None:
    assert ShikraBoxes(digits=2, view=WholePicture()).write([CAT], SIZE, "cat") == "[0.10,0.40,0.50,0.80]"
    with pytest.raises(ValueError, match=r"`digits` is 0; give 1 to 6"):
        ShikraBoxes(digits=0)
