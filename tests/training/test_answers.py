"""Answers as tokens: in the middle of a text, whatever the tokenizer does at the beginning of one."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moadapt.training.answers import AnswerWriter
from moadapt.training.prompts import PromptWriter
from tests.training import toy

SPACE = "▁"


def _tokenizer(**parts: Any) -> PreTrainedTokenizerFast:
    letters = ["<unk>", "<eos>", *"abcdefghijklmnopqrstuvwxyz:?!<>/ \n", SPACE]
    merges = [(SPACE, "r"), (SPACE + "r", "e"), (SPACE + "re", "d"), ("r", "e"), ("re", "d"), (SPACE, SPACE)]
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    for name, part in parts.items():
        setattr(built, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>", unk_token="<unk>")


def sentencepiece(chat: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, as Llama's does."""
    space = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made = _tokenizer(normalizer=space, decoder=decoders.Metaspace())
    made.chat_template = chat
    return made


def metaspace(chat: str | None) -> PreTrainedTokenizerFast:
    """One that puts a space before every word that follows nothing."""
    made = _tokenizer(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"), decoder=decoders.Metaspace())
    made.chat_template = chat
    return made


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'user' %} {% endif %}{% endfor %}"
LEADING = TURNS + "{% if add_generation_prompt %}assistant:{% endif %}"
"""Writes a space before the answer, which the prompt does not end in."""


@pytest.mark.parametrize("answer", ["red", "a red", " red", "  red", "red\n red", "\nred", "<eos>red", "red <eos", ""])
@pytest.mark.parametrize("chat", [None, LEADING], ids=["plain", "template"])
@pytest.mark.parametrize("make", [sentencepiece, metaspace])
def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt(make: Any, chat: str | None, answer: str) -> None:
    prompts = PromptWriter(make(chat))
    tokenizer, before = prompts.tokenizer, prompts.prompt("what?")
    lead = " " if chat else ""
    [ids] = AnswerWriter(prompts).tokens([answer])
    end = tokenizer.eos_token_id
    assert ids[-1] == end
    assert end not in ids[:-1]
    if "<eos>" not in answer:
        both, prompt = (tokenizer(text).input_ids for text in (before + lead + answer, before))
        assert both[: len(prompt)] == prompt
        assert ids[:-1] == both[len(prompt) :]


@pytest.mark.parametrize("template", ["", "{{ messages[-1]['content'] | upper }}", "{{ 'nothing' }}"])
def test_a_template_that_does_not_go_on_from_its_own_prompt_gives_the_answer_alone(template: str) -> None:
    processor = toy.tokenizer()
    processor.chat_template = template or None
    writer = AnswerWriter(PromptWriter(processor))
    [ids] = writer.tokens(["red"])
    assert toy.tokenizer().decode(ids) == "red<eos>"
    assert writer.text(ids) == "red"


def test_the_end_is_what_the_template_writes() -> None:
    tokenizer = toy.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}<turn>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    writer = AnswerWriter(PromptWriter(tokenizer))
    [ids] = writer.tokens(["  red<turn> "])
    assert tokenizer.decode(ids) == "  red<turn> <turn>"
    assert [each for each in ids if each in writer.hidden] == [writer.end]
    assert writer.end == tokenizer.convert_tokens_to_ids("<turn>")


def test_a_decoder_gets_answers_as_texts_of_their_own() -> None:
    tokenizer = sentencepiece(None)
    writer = AnswerWriter(PromptWriter(tokenizer, encoder=True), apart=True)
    [ids] = writer.tokens(["red"])
    assert ids == [*tokenizer("red").input_ids, tokenizer.eos_token_id]
