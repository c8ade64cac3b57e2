"""Tokens inserted into rows and cut out of what comes of them."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from moadapt.call import Request
from moadapt.inserting import insert, plain_token
from moadapt.insertion import Insertion
from tests.core.zoo import ZOO, build

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
IDS = torch.tensor([[11, 12, 13, 0], [0, 0, 23, 24], [0, 0, 0, 0]])


def test_tokens_go_before_the_first_real_one() -> None:
    where = Insertion.before(MASK, 2)
    assert where.into(IDS, 9).tolist() == [[9, 9, 11, 12, 13, 0], [0, 0, 9, 9, 23, 24], [9, 9, 0, 0, 0, 0]]
    assert where.positions.tolist() == [[0, 1], [2, 3], [0, 1]]


def test_what_is_cut_is_what_was_there() -> None:
    where, values = Insertion.before(MASK, 3), torch.randn(3, 4, 5)
    wide = where.into(values, 0)
    assert wide.shape == (3, 7, 5)
    assert torch.equal(where.out_of(wide), values)
    for kept in (1, 2, 3):  # of the last tokens alone, of which n more are asked for
        assert torch.equal(where.out_of(wide[:, -(kept + 3) :]), values[:, -kept:])


def test_sequences_of_beams_get_their_prompt_back() -> None:
    where = Insertion.before(MASK, 2)
    grown = torch.cat([where.into(IDS, 9).repeat_interleave(2, dim=0), torch.arange(6).view(6, 1)], dim=1)
    expected = torch.cat([IDS.repeat_interleave(2, dim=0), torch.arange(6).view(6, 1)], dim=1)
    assert torch.equal(where.out_of_sequences(grown), expected)


def test_everything_a_token_has_grows_and_nothing_else() -> None:
    given: dict[str, Any] = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "labels": IDS.clone(),
        "shift_labels": IDS.clone(),
        "mm_token_type_ids": MASK + 1,
        "cross_attention_mask": torch.ones(3, 4, 1, 2, dtype=torch.long),
        "image_sizes": torch.ones(3, 4, dtype=torch.long),
        "pixel_values": torch.randn(3, 4),
        "use_cache": False,
        "logits_to_keep": 1,
        "max_length": 9,
        "min_length": None,
    }
    prompt = MASK.bool()
    found = insert(given, Request(prompt_mask=prompt), 2, 9)
    assert found.where is not None
    fills = {"input_ids": 9, "attention_mask": 1, "labels": -100, "shift_labels": -100}
    fills |= {"mm_token_type_ids": 0, "cross_attention_mask": 0}
    for name, value in given.items():
        if name in fills:
            assert torch.equal(found.inputs[name], found.where.into(value, fills[name])), name
        elif name in ("logits_to_keep", "max_length"):
            assert found.inputs[name] == value + 2
        else:
            assert found.inputs[name] is value
    assert found.request.prompt_mask is not None
    assert torch.equal(found.request.prompt_mask, found.where.into(prompt, 0))
    assert given["input_ids"] is IDS


def test_a_mask_of_decimal_numbers_grows_too() -> None:
    found = insert({"input_ids": IDS, "attention_mask": MASK.float()}, Request(), 2, 9)
    assert torch.equal(found.inputs["attention_mask"], Insertion.before(MASK, 2).into(MASK, 1).float())


def test_positions_from_the_end_stay() -> None:
    found = insert({"input_ids": IDS, "logits_to_keep": torch.tensor([0, 3, -1])}, Request(), 2, 9)
    assert found.inputs["logits_to_keep"].tolist() == [2, 5, -1]


def test_positions_move_with_their_tokens() -> None:
    """Those of padding before the first real token stay, and so do those that stand for none."""
    found = insert(
        {"input_ids": IDS, "attention_mask": MASK, "start_positions": torch.tensor([0, 1, -1])}, Request(), 2, 9
    )
    assert found.inputs["start_positions"].tolist() == [2, 1, -1]
    where = Insertion.before(MASK, 2)
    assert where.moved(torch.tensor([[2], [3], [4]])).tolist() == [[4], [5], [6]]  # the last is behind the row


def test_lengths_of_a_generation_config_grow_in_a_copy() -> None:
    chosen = GenerationConfig(max_length=9)
    found = insert({"inputs": IDS, "generation_config": chosen}, Request(), 2, 9, generates=GenerationConfig())
    assert found.inputs["generation_config"].max_length == 11
    assert chosen.max_length == 9
    assert found.inputs["input_ids"].shape == (3, 6)


def test_lengths_that_the_base_sets_grow_unless_others_go_before() -> None:
    own = GenerationConfig(max_length=16, min_length=8)
    found = insert({"input_ids": IDS}, Request(), 2, 9, generates=own).inputs
    assert (found["max_length"], found["min_length"]) == (18, 10)
    assert own.max_length == 16
    assert "max_length" not in insert({"input_ids": IDS, "max_new_tokens": 3}, Request(), 2, 9, generates=own).inputs
    chosen = insert({"input_ids": IDS, "generation_config": GenerationConfig()}, Request(), 2, 9, generates=own).inputs
    assert (chosen["generation_config"].max_length, "max_length" in chosen) == (18, False)
    assert insert({"input_ids": IDS, "max_length": 4}, Request(), 2, 9, generates=own).inputs["max_length"] == 6


def test_without_tokens_to_insert_nothing_is_touched() -> None:
    given = {"inputs_embeds": torch.randn(1, 2, 3), "position_ids": torch.arange(2)[None]}
    request = Request()
    found = insert(given, request, 0, 9)
    assert found.inputs == given
    assert found.request is request
    output = object()
    assert found.cut(output) is output
    assert found.cut_generated(output) is output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs_embeds": torch.randn(1, 2, 3)}, "takes input_ids and counts positions itself; got inputs_embeds"),
        ({"input_ids": IDS, "position_ids": IDS}, "got position_ids"),
        ({"pixel_values": torch.randn(1, 3, 4, 4)}, "got no input_ids"),
        ({"input_ids": IDS, "return_dict": False}, "return_dict=False"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 1, 4, 4)}, r"attention_mask is no \(B, T\)"),
    ],
    ids=["embeds", "positions", "no_ids", "tuple", "mask"],
)
def test_inputs_that_cannot_grow_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        insert(given, Request(), 2, 9)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("vit", "dinov2")])
def test_a_plain_token_stands_for_nothing(name: str) -> None:
    base = build(name)
    token = plain_token(base)
    for config in (base.config, base.config.get_text_config()):
        for special in ("pad_token_id", "eos_token_id", "image_token_id", "image_token_index", "video_token_id"):
            assert token != getattr(config, special, None)
    assert 0 <= token < base.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr,index,operator]
