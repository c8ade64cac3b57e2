from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt.picture import Picture
from moadapt.task import Example
from moadapt.training.batch import IGNORED
from moadapt.training.collate import Collator, Item, open_pictures
from moadapt.training.sequences import answers_apart, append_answers, padded
from tests.training import toy


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    tasks = toy.toy_tasks(tmp_path)
    return [Item(name, task.read("train")[0][row], row) for row, (name, task) in enumerate(tasks.items())]


@pytest.mark.parametrize("chat", [toy.CHAT, None], ids=["template", "plain"])
def test_labels_are_the_answer_and_its_end(items: list[Item], chat: str | None) -> None:
    batch = Collator(toy.processor(chat), seed=0, answers=True)(items)
    tokenizer = toy.tokenizer()
    assert batch.labels is not None
    told = [tokenizer.decode(row[row != IGNORED]) for row in batch.labels]
    assert told == [f"{item.example.answers[0]}<eos>" for item in items]
    same = batch.labels != IGNORED
    assert torch.equal(batch.inputs["input_ids"][same], batch.labels[same])


@pytest.mark.parametrize("chat", [toy.CHAT, None], ids=["template", "plain"])
def test_training_reads_the_tokens_that_generation_will(items: list[Item], chat: str | None) -> None:
    trained = Collator(toy.processor(chat), seed=0, answers=True)(items)
    asked = Collator(toy.processor(chat), seed=0, answers=False)(items)
    for row in range(len(items)):
        own = asked.inputs["input_ids"][row][asked.inputs["attention_mask"][row].bool()]
        assert torch.equal(trained.inputs["input_ids"][row][trained.prompt_mask[row]], own)
        assert int((own == 2).sum()) == 4  # four patches
    assert torch.equal(trained.inputs["pixel_values"], asked.inputs["pixel_values"])
    assert asked.labels is None


def test_prompts_are_padded_on_the_left_and_answers_on_the_right(items: list[Item]) -> None:
    asked = Collator(toy.processor(), seed=0, answers=False)(items).inputs["attention_mask"]
    trained = Collator(toy.processor(), seed=0, answers=True)(items).inputs["attention_mask"]
    assert asked[:, -1].all()
    assert trained[:, 0].all()
    assert not asked.all()
    assert not trained.all()


def test_columns_are_the_positions_before_answer_tokens(items: list[Item]) -> None:
    batch = Collator(toy.processor(), seed=0, answers=True)(items)
    assert batch.labels is not None
    assert batch.columns is not None
    expected = sorted({t - 1 for row in batch.labels for t in (row != IGNORED).nonzero().flatten().tolist()})
    assert batch.columns.tolist() == expected


def test_the_template_without_picture_words_gives_the_plain_form(items: list[Item]) -> None:
    collator = Collator(toy.processor(None), seed=0, answers=True)
    assert collator.prompts.prompt("what?") == "<image>\nwhat?\n"


@pytest.mark.parametrize("chat", [toy.CHAT, None], ids=["template", "plain"])
def test_rows_show_as_many_pictures_as_they_have(items: list[Item], chat: str | None) -> None:
    example = items[0].example
    rows = [replace(items[0], example=replace(example, pictures=example.pictures * count)) for count in (2, 0, 1)]
    for answers in (True, False):
        batch = Collator(toy.processor(chat), seed=0, answers=answers)(rows)
        assert (batch.inputs["input_ids"] == 2).sum(dim=1).tolist() == [8, 0, 4]  # four patches a picture
        assert len(batch.inputs["pixel_values"]) == 3
    assert "pixel_values" not in Collator(toy.processor(chat), seed=0, answers=True)(rows[1:2]).inputs


def test_a_tokenizer_alone_writes_prompts_without_picture(items: list[Item]) -> None:
    batch = Collator(toy.tokenizer(), seed=0, answers=True)(items)
    assert set(batch.inputs) - {"token_type_ids"} == {"input_ids", "attention_mask"}
    assert toy.tokenizer().decode(batch.inputs["input_ids"][0][batch.prompt_mask[0]]) == "colour?\n"


def test_answers_get_their_own_type_where_the_processor_tells_answers_by_type(items: list[Item]) -> None:
    class ByType:
        """Gives labels and token types as PaliGemma's processor does."""

        def __init__(self) -> None:
            self.plain = toy.processor(None)
            self.tokenizer, self.image_processor = self.plain.tokenizer, self.plain.image_processor

        def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
            made = dict(self.plain(**given))
            types = torch.zeros_like(made["input_ids"])
            return {**made, "token_type_ids": types, "labels": types - 100}

    batch = Collator(ByType(), seed=0, answers=True)(items)
    assert batch.labels is not None
    assert torch.equal(batch.inputs["token_type_ids"], (batch.labels != IGNORED).long())
    assert "labels" not in batch.inputs
    assert "labels" not in Collator(ByType(), seed=0, answers=False)(items).inputs


def test_each_turn_takes_another_answer_until_all_were_taken(items: list[Item]) -> None:
    answers = ("one", "two", "three")
    example = replace(items[0].example, answers=answers)
    collator = Collator(toy.processor(), seed=0, answers=True)
    orders = {tuple(collator._chosen(Item("small", example, row, turn)) for turn in range(3)) for row in range(20)}
    assert all(sorted(order) == sorted(answers) for order in orders)
    assert len(orders) > 1  # rows do not all begin with the first one


def test_other_inputs_of_the_sequence_go_on_as_at_the_prompts_end() -> None:
    prompts = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "kinds": torch.tensor([[0, 3, 4], [1, 1, 2]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 1], [0, 1, 1]]),
        "pixel_values": torch.zeros(2, 1),
    }
    inputs, labels = append_answers(prompts, [[1, 2], [3]], padding=0)
    assert inputs["input_ids"].tolist() == [[5, 6, 1, 2], [7, 8, 9, 3]]
    assert inputs["kinds"].tolist() == [[3, 4, 4, 4], [1, 1, 2, 2]]
    assert inputs["mm_token_type_ids"].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]  # answers are text
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert labels.tolist() == [[-100, -100, 1, 2], [-100, -100, -100, 3]]
    assert inputs["pixel_values"] is prompts["pixel_values"]


@pytest.mark.parametrize(("side", "rows"), [("left", [[0, 0, 5], [7, 8, 9]]), ("right", [[5, 0, 0], [7, 8, 9]])])
def test_padding_goes_to_one_side_wherever_it_was(side: str, rows: list[list[int]]) -> None:
    inputs = {
        "input_ids": torch.tensor([[0, 5, 0, 0], [7, 0, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 0, 0], [1, 0, 1, 1]]),
    }
    moved = padded(inputs, 0, side)
    assert moved["input_ids"].tolist() == rows
    assert torch.equal(moved["attention_mask"], (moved["input_ids"] != 0).long())


def test_a_decoder_reads_the_token_before_each_that_it_writes() -> None:
    prompts = {"input_ids": torch.tensor([[0, 5], [7, 8]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    inputs, labels = answers_apart(prompts, [[1, 2, 3], [4]], padding=0, start=9)
    assert inputs["input_ids"].tolist() == [[5, 0], [7, 8]]
    assert inputs["decoder_input_ids"].tolist() == [[9, 1, 2], [9, 4, 0]]
    assert labels.tolist() == [[1, 2, 3], [4, -100, -100]]


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nnonsense"], ids=["missing", "empty", "broken"])
def test_a_picture_that_cannot_be_read_is_named_with_its_entry(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "picture.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"questions\.json: question_id 7.*picture\.png"):
        open_pictures(Example((Picture(file, (1, 1)),), "", ("",), "", "questions.json: question_id 7"))
