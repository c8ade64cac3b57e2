"""Prompts and answer masks of every class: the form that its publishers give, and labels that are the answer alone."""

import re
from functools import cache

import pytest
import torch

from moadapt.training.answers import GROUNDING
from moadapt.training.batch import IGNORED
from tests.bases.rows import WRITERS, collated, collator, counts_of, items
from tests.bases.twins import Twin, twin

SEEING = [name for name in WRITERS if name not in ("llama", "gpt2", "t5")]
FORMS = {  # the prompt with one picture, what the template puts before an answer, and what ends it
    "llama": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nwhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>",
    ),
    "gpt2": ("what?\n", "", "<|endoftext|>"),
    "t5": ("what?</s>", "", "</s>"),
    "llava": ("<s>USER: <image>\nwhat? ASSISTANT:", " ", "</s>"),
    "llava_next": ("<s>[INST] <image>\nwhat? [/INST]", " ", "</s>"),
    "llava_pixtral": ("<s>[INST][IMG]what?[/INST]", "", "</s>"),
    "llava_onevision": (
        "<|im_start|>user <image>\nwhat?<|im_end|><|im_start|>assistant\n", "", "<|im_end|>",
    ),
    "qwen2_5_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>",
    ),
    "qwen3_vl": (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n",
        "", "<|im_end|>",
    ),
    "paligemma": ("<image><bos>what?\n", "", "<eos>"),
    "gemma3": (
        "<bos><start_of_turn>user\n\n\n<start_of_image><image_soft_token><end_of_image>\n\nwhat?<end_of_turn>\n"
        "<start_of_turn>model\n", "", "<end_of_turn>",
    ),
    "idefics3": (
        "<|im_start|>User:<fake_token_around_image><global-img><image><fake_token_around_image>what?"
        "<end_of_utterance>\nAssistant:", " ", "<end_of_utterance>",
    ),
    "internvl": (
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nwhat?<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>",
    ),
    "mllama": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>what?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>",
    ),
    "blip2": ("<image></s>what?\n", "", "</s>"),
    "florence2": ("<image><s>what?</s>", "<s>", "</s>"),
}  # fmt: skip
FORMS["smolvlm"] = FORMS["idefics3"]
NASTY = [
    "red",
    "  two spaces before",
    "one line\n\n  another\n",
    "\nnew line first",
    "naïve 名前 🙂 e\u0301",
    "ends so ",
    "",
]

made = cache(twin)


def told(name: str, answer: str) -> str:
    """Return the labels of one row's answer, decoded."""
    batch = collated(made(name), items(name, [answer]), answers=True)
    assert batch.labels is not None
    tokenizer = collator(made(name)).prompts.tokenizer
    texts = {tokenizer.decode(row[row != IGNORED]) for row in batch.labels}
    assert len(texts) == 1
    return texts.pop()


def tokens_of(of: Twin, between: str) -> str:
    """Return all special tokens of a twin, but those that boxes are written with, in a row."""
    tokens = collator(of).prompts.tokenizer.added_tokens_decoder.values()
    return between.join(token.content for token in tokens if not GROUNDING.fullmatch(token.content))


@pytest.mark.parametrize("name", WRITERS)
def test_a_prompt_has_the_published_form(name: str) -> None:
    batch = collated(made(name), items(name, ["red"], [int(name in SEEING)]), answers=False)
    text = collator(made(name)).prompts.tokenizer.decode(batch.inputs["input_ids"][0])
    for token in ("<image>", "[IMG]", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>"):
        text = re.sub(f"(?:{re.escape(token)})+", token, text)
    text = re.sub(r"(?:(?:<fake_token_around_image><row_\d_col_\d><image>)+\n)+\n", "", text)
    assert text == FORMS[name][0]  # of patches in a row the first, and no tiles


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("answer", NASTY)
def test_labels_are_the_answer_and_its_end(name: str, answer: str) -> None:
    _, lead, end = FORMS[name]
    assert told(name, answer) == f"{lead}{answer}{end}"


@pytest.mark.parametrize("name", WRITERS)
def test_text_like_special_tokens_stays_text(name: str) -> None:
    _, lead, end = FORMS[name]
    answer = f"<{tokens_of(made(name), ' ')}>" + tokens_of(made(name), "")
    assert told(name, answer) == f"{lead}{answer}{end}"
    writer = collator(made(name)).written
    [ids] = writer.tokens([answer])
    specials = [each for each in ids if each in writer.hidden]
    assert specials == ids[:1] * (name == "florence2") + [writer.end]
    assert writer.text(ids) == lead.replace("<s>", "") + answer


@pytest.mark.parametrize(
    ("name", "answer", "tokens"),
    [
        ("paligemma", "<loc0017><loc1023> cat", ["<loc0017>", "<loc1023>"]),
        ("florence2", "cat<loc_17><loc_999>", ["<loc_17>", "<loc_999>"]),
        ("internvl", "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>", ["<ref>", "</ref>", "<box>", "</box>"]),
    ],
)
def test_boxes_are_written_with_tokens_of_their_own(name: str, answer: str, tokens: list[str]) -> None:
    writer = collator(made(name)).written
    answer += " </s><eos><|im_end|>"
    [ids] = writer.tokens([answer])
    added = [token for token in map(writer.tokenizer.convert_ids_to_tokens, ids) if token in tokens]
    assert added == tokens
    assert writer.text(ids) == answer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", WRITERS)
def test_training_reads_the_tokens_that_generation_will(name: str, side: str) -> None:
    of, rows = twin(name), items(name, NASTY)
    collator(of).prompts.tokenizer.padding_side = side
    trained, asked = collated(of, rows, answers=True), collated(of, rows, answers=False)
    length = asked.inputs["attention_mask"].shape
    assert trained.labels is not None
    for row in range(len(rows)):
        real, prompt = asked.inputs["attention_mask"][row].bool(), trained.prompt_mask[row]
        for given, tensor in asked.inputs.items():
            if tensor.shape[:2] == length and given != "decoder_input_ids":
                assert torch.equal(trained.inputs[given][row][prompt], tensor[row][real]), given
        edge = real if of.model.config.is_encoder_decoder else real.flip(0)
        assert real.sum() == edge.cumprod(0).sum(), "padding on one side"
        assert trained.inputs["attention_mask"][row].cumprod(0).sum() == trained.inputs["attention_mask"][row].sum()
    for given, tensor in asked.inputs.items():
        if given == "decoder_input_ids":
            assert torch.equal(trained.inputs[given][:, :1], tensor)
        elif tensor.shape[:2] != length:
            assert torch.equal(trained.inputs[given], tensor), given
    assert asked.labels is None


@pytest.mark.parametrize("name", WRITERS)
def test_rows_together_are_read_as_each_alone(name: str) -> None:
    """The reason why Mllama's rows must have equally many pictures; it is so where they do."""
    of, rows = made(name), items(name, NASTY)
    together = collated(of, rows, answers=True)
    with torch.no_grad():
        logits = of.model(**together.inputs).logits
        for index, row in enumerate(rows):
            batch = collated(of, [row], answers=True)
            assert batch.labels is not None
            expected = of.model(**batch.inputs).logits[0]
            real = (batch.labels if batch.apart else batch.inputs["input_ids"]).shape[1]
            torch.testing.assert_close(logits[index, :real], expected, rtol=1e-4, atol=1e-4, msg=f"row {index}")


@pytest.mark.parametrize("name", WRITERS)
def test_tokens_of_an_answer_read_none_that_follow(name: str) -> None:
    of, batch = made(name), collated(made(name), items(name, ["red"]), answers=True)
    assert batch.labels is not None
    read = "decoder_input_ids" if batch.apart else "input_ids"
    told = (batch.labels != IGNORED).int()
    last = torch.arange(told.shape[1]).expand_as(told) == told.shape[1] - 1 - told.flip(1).argmax(dim=1, keepdim=True)
    other = batch.inputs[read].masked_fill(last, 9)
    assert not torch.equal(other, batch.inputs[read])
    with torch.no_grad():
        before, after = (of.model(**{**batch.inputs, read: ids}).logits for ids in (batch.inputs[read], other))
    earlier = last.flip(1).cumsum(dim=1).flip(1).bool() & ~last
    torch.testing.assert_close(before[earlier], after[earlier], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[last], after[last], atol=1e-3)


@pytest.mark.parametrize("name", SEEING)
def test_pictures_change_what_follows_them(name: str) -> None:
    of = made(name)
    batch = collated(of, items(name, ["red"]), answers=True)
    with torch.no_grad():
        logits = of.model(**batch.inputs).logits
        other = of.model(**{**batch.inputs, "pixel_values": -batch.inputs["pixel_values"]}).logits
    changed = (logits[:, -1] - other[:, -1]).abs().amax(dim=-1) > 1e-3
    assert changed.tolist() == [count > 0 for count in counts_of(name)]


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        (
            "paligemma",
            0,
            "PaliGemmaProcessor takes at least 1 picture a row, and the row that asks 'what. really.' has 0",
        ),
        ("blip2", 0, "Blip2Processor takes exactly 1 picture"),
        ("blip2", 2, "Blip2Processor takes exactly 1 picture"),
        ("florence2", 0, "Florence2Processor takes exactly 1 picture"),
        ("florence2", 3, "Florence2Processor takes exactly 1 picture"),
        (
            "mllama",
            0,
            "MllamaProcessor takes rows with equally many pictures in a batch, and this one has rows with 0, 1",
        ),
    ],
)
def test_rows_with_more_or_fewer_pictures_than_a_class_takes_are_refused(name: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collated(made(name), items(name, ["red"], [1, count]), answers=True)


@pytest.mark.parametrize("name", SEEING)
def test_a_prompt_that_writes_a_picture_itself_is_refused(name: str) -> None:
    prompts = collator(made(name)).prompts
    for token in prompts.placeholders:
        with pytest.raises(ValueError, match=f"holds {re.escape(token)}, which stands for a picture"):
            prompts.prompt(f"what is {token}?")
