"""Prompts and answers as token ids, in the form that a base's own processor and chat template ask for."""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from transformers import BatchFeature


class PromptWriter:
    """Writes prompts with pictures, and the answers that follow them.

    With a chat template, a row is one user turn with its pictures and the prompt; the answer is the assistant's turn up
    to its end. Without one, a row reads `<image>` and a new line for each picture, the prompt and another new line.

    Args:
        processor: A transformers processor, or a tokenizer for a base without pictures.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.has_pictures = hasattr(processor, "image_processor")
        self.has_template = getattr(processor, "chat_template", None) is not None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prompt(self, text: str, pictures: int = 1) -> str:
        """Return the text in front of the answer.

        Args:
            text: The prompt, without picture or template.
            pictures: How many pictures stand before it, where the base takes any.
        """
        if self.has_template:
            return self._render([self._turn("user", text, pictures)], add_generation_prompt=True)
        image = f"{getattr(self.processor, 'image_token', '<image>')}\n" if self.has_pictures else ""
        return f"{image * pictures}{text}\n"

    def prompt_tokens(self, texts: Sequence[str], images: Sequence[Sequence[Image]]) -> BatchFeature:
        """Return what the base takes for prompts, padded on the left.

        Args:
            texts: Prompts, without picture or template.
            images: Those of each prompt.
        """
        prompts = [self.prompt(text, len(own)) for text, own in zip(texts, images, strict=True)]
        start = self.tokenizer.bos_token
        own_start = self.has_template and start is not None and all(prompt.startswith(start) for prompt in prompts)
        pictures = {"images": [list(own) for own in images]} if self.has_pictures and any(images) else {}
        tokens: BatchFeature = self.processor(
            text=prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=not own_start,
            return_tensors="pt",
            **pictures,
        )
        return tokens

    def answer_tokens(self, prompts: Sequence[str], answers: Sequence[str], pictures: Sequence[int]) -> list[list[int]]:
        """Return answers as tokens, the end of sequence last.

        Args:
            prompts: The prompts they follow, without picture or template.
            answers: One a prompt.
            pictures: How many stand before each prompt.
        """
        texts = [self._answer(*each) for each in zip(prompts, answers, pictures, strict=True)]
        end = self.tokenizer.eos_token_id
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [[*ids[: ids.index(end)], end] if end in ids else [*ids, end] for ids in rows]

    def _answer(self, prompt: str, answer: str, pictures: int) -> str:
        if self.has_template:
            turns = [self._turn("user", prompt, pictures), self._turn("assistant", answer)]
            before, both = self.prompt(prompt, pictures), self._render(turns)
            if both.startswith(before):
                return both.removeprefix(before).removesuffix("\n").removesuffix(" ")
        return answer

    def _turn(self, role: str, text: str, pictures: int = 0) -> dict[str, Any]:
        if not self.has_pictures:
            return {"role": role, "content": text}
        return {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}

    def _render(self, turns: list[dict[str, Any]], **options: Any) -> str:
        rendered: str = self.processor.apply_chat_template(turns, tokenize=False, **options)
        return rendered
