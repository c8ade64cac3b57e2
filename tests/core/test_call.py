"""What a pass is about: rows, prompt, image tokens and tasks, found in the base's own inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.call import Call, Request, check_filled, check_prompt, prompt_tokens, read_call
from tests.models import IMAGE_TOKEN, PATCHES, llava_batch, padded, prompt_of

PROMPT, ANSWER = 5, 4
LENGTH = PATCHES + PROMPT + ANSWER


def read(
    batch: dict[str, Any], *, image_tokens: tuple[int, ...] = (IMAGE_TOKEN,), continues: bool = False, **said: Any
) -> Call:
    return read_call(batch, Request(**said), image_tokens, continues=continues)


def test_the_prompt_is_what_stands_before_the_first_label() -> None:
    batch = llava_batch()
    batch["labels"][1, : PATCHES + 2] = -100
    batch["labels"][1, PATCHES + 2] = 9
    batch["labels"][2, -2:] = -100  # behind an answer nothing is prompt
    lengths = torch.tensor([PATCHES + PROMPT, PATCHES + 2, PATCHES + PROMPT])
    assert torch.equal(read(batch).prompt, torch.arange(LENGTH) < lengths.unsqueeze(1))


def test_without_labels_all_real_tokens_are_prompt() -> None:
    batch = prompt_of(llava_batch())
    assert read(batch).prompt.all()
    del batch["attention_mask"]
    assert read(batch).prompt.all()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_prompt_on_either_side(side: str, labelled: bool) -> None:
    batch = llava_batch() if labelled else prompt_of(llava_batch())
    prompt = read(batch).prompt
    padding = torch.zeros(3, 2, dtype=torch.bool)
    expected = torch.cat([padding, prompt] if side == "left" else [prompt, padding], dim=1)
    call = read(padded(batch, 2, side))
    assert torch.equal(call.prompt, expected)
    assert call.num_rows == 3


def test_labelled_padding_is_no_prompt() -> None:
    real, labels = torch.tensor([[0, 0, 1, 1, 1]]).bool(), torch.tensor([[7, -100, -100, -100, 7]])
    assert not prompt_tokens(real, labels).any()
    labels[0, 0] = -100
    assert prompt_tokens(real, labels).tolist() == [[False, False, True, True, False]]


def test_a_prompt_mask_replaces_the_labels_but_never_reaches_padding() -> None:
    batch = padded(llava_batch(), 2, "left")
    mask = torch.zeros(3, LENGTH + 2, dtype=torch.long)
    mask[:, :7] = 1
    expected = mask.bool() & batch["attention_mask"].bool()
    assert torch.equal(read(batch, prompt_mask=mask).prompt, expected)
    assert expected.sum() == 3 * 5


@pytest.mark.parametrize("shape", [(LENGTH,), (1, LENGTH), (3, LENGTH - 1), (3, LENGTH, 1)], ids=str)
def test_a_prompt_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"prompt_mask has shape \(.*\), but the tokens have \(3, 13\)"):
        read(llava_batch(), prompt_mask=torch.ones(shape))


def four_axes(mask: Tensor, *, boolean: bool) -> Tensor:
    """The causal mask (B, 1, T, T) of a padding mask, as booleans or as what is added to the scores."""
    length = mask.shape[1]
    allowed = mask.bool()[:, None, None, :] & torch.ones(length, length).tril().bool()
    return allowed if boolean else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_four_axes_tell_the_same_padding(side: str, boolean: bool) -> None:
    batch = padded(llava_batch(), 2, side)
    expected = read(batch).prompt
    whole = four_axes(batch["attention_mask"], boolean=boolean)
    for mask in (whole, {"full_attention": whole}, {"sliding_attention": None, "full_attention": whole}):
        assert torch.equal(read({**batch, "attention_mask": mask}).prompt, expected)


def test_a_mask_that_masks_nothing_leaves_all_tokens_real() -> None:
    batch = prompt_of(llava_batch())
    for mask in (None, {}, {"full_attention": None}):
        assert read({**batch, "attention_mask": mask}).prompt.all()


@pytest.mark.parametrize("mask", [torch.ones(3, 4, 4), "causal"], ids=["three axes", "text"])
def test_a_mask_that_tells_no_padding_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_mask is a \w+, which tells no padding; pass a mask \(B, T\)"):
        read({**llava_batch(), "attention_mask": mask})


def test_what_was_generated_is_no_prompt() -> None:
    batch = llava_batch()
    del batch["labels"]
    prompt = read(batch, prompt_shape=(3, PATCHES + PROMPT)).prompt
    assert torch.equal(prompt, (torch.arange(LENGTH) < PATCHES + PROMPT).expand(3, -1))


def test_what_continues_a_cache_has_no_prompt() -> None:
    call = read({"input_ids": torch.ones(3, 1, dtype=torch.long), "attention_mask": torch.ones(3, 9)}, continues=True)
    assert (call.prompt, call.num_rows, call.continues) == (None, 3, True)


def test_labels_that_lie_on_no_token_do_not_cut_the_prompt() -> None:
    batch = llava_batch()
    assert read({**batch, "labels": torch.tensor([0, 1, 0])}).prompt.all()


def test_image_tokens_are_those_of_images_and_videos() -> None:
    batch = llava_batch()
    assert torch.equal(read(batch).image, (torch.arange(LENGTH) < PATCHES).expand(3, -1))
    video = int(batch["input_ids"][1, -1])
    both = (batch["input_ids"] == IMAGE_TOKEN) | (batch["input_ids"] == video)
    assert torch.equal(read(batch, image_tokens=(IMAGE_TOKEN, video)).image, both)
    assert read(batch, image_tokens=()).image is None
    embeddings = {"inputs_embeds": torch.zeros(3, LENGTH, 32), "attention_mask": batch["attention_mask"]}
    assert read(embeddings).image is None
    assert read(embeddings).prompt.shape == (3, LENGTH)


def test_a_call_of_pictures_alone_has_rows_and_no_prompt() -> None:
    call = read({"pixel_values": torch.zeros(4, 3, 16, 16)}, task_ids=torch.tensor([2]))
    assert (call.num_rows, call.prompt) == (4, None)
    assert call.in_step(torch.zeros(4, 2, 3))
    assert call.task_ids.tolist() == [2] * 4


def test_an_encoder_decoder_step_counts_its_decoder_tokens() -> None:
    assert read({"encoder_outputs": object(), "decoder_input_ids": torch.ones(2, 1, dtype=torch.long)}).num_rows == 2


def test_labels_on_the_prompt_are_refused() -> None:
    prompt, labels = torch.tensor([[True, True, False]] * 2), torch.full((2, 3), -100)
    labels[:, 2] = 7
    check_prompt(prompt, labels, "a router")
    check_prompt(prompt, None, "a router")
    check_prompt(prompt, torch.tensor([0, 1]), "a router")  # of a classifier
    labels[1, 1] = 7
    with pytest.raises(ValueError, match=r"labels lie on prompt tokens.*-100 on the prompt or pass a smaller prompt_m"):
        check_prompt(prompt, labels, "a router")


def test_rows_without_a_prompt_are_refused_by_number() -> None:
    prompt = torch.tensor([[True, False], [False, False], [False, True], [False, False]])
    with pytest.raises(ValueError, match=r'rows \[1, 3\] have no prompt token.*prompt_mask or use scope="token"'):
        check_filled(prompt)


@pytest.mark.parametrize(
    ("ids", "rows", "shape", "expected"),
    [
        (None, 3, None, None),
        ([1], 3, None, [1, 1, 1]),
        ([1, 0, 2], 3, None, [1, 0, 2]),
        ([1, 0], 6, (2, 9), [1, 1, 1, 0, 0, 0]),  # three beams a row
        ([1], 6, (2, 9), [1] * 6),
        ([1], 1, None, [1]),
    ],
)
def test_tasks_are_spread_over_rows_and_beams(
    ids: list[int] | None, rows: int, shape: tuple[int, int] | None, expected: list[int] | None
) -> None:
    found = Request(None if ids is None else torch.tensor(ids), prompt_shape=shape).row_tasks(rows)
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(("given", "rows", "shape"), [(2, 3, None), (2, 4, None), (0, 3, None), (2, 3, (2, 9))])
def test_a_number_of_tasks_that_fits_no_rows_is_refused(given: int, rows: int, shape: tuple[int, int] | None) -> None:
    expected = f"got {given} task names for {rows} rows; give one name, or one a row"
    with pytest.raises(ValueError, match=expected):
        Request(torch.zeros(given, dtype=torch.long), prompt_shape=shape).row_tasks(rows)
