"""Prompts as token ids, in the form that a base's own processor and chat template ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from transformers import BatchFeature

_MEDIA = ("image", "video", "audio")


@dataclass(frozen=True)
class Form:
    """What prompts a processor takes.

    Args:
        text: The prompt where there is no chat template, with `{pictures}` and `{text}` where they stand.
        picture: What stands for one picture there.
        least: Fewest pictures of a row.
        most: Most of them, the same number; None for any.
        alike: Whether all rows of a batch must have equally many.
    """

    text: str = "{pictures}{text}\n"
    picture: str = "{token}\n"
    least: int = 0
    most: int | None = None
    alike: bool = False


_FORMS = {
    "MllamaProcessor": Form(alike=True),  # rows with fewer are padded, and text before a picture reads the padding
    "PaliGemmaProcessor": Form("{pictures}{text}", "{token}", least=1),  # it writes the new line itself
    "Blip2Processor": Form("{text}\n", least=1, most=1),  # it writes the picture itself
    "Florence2Processor": Form("{text}", least=1, most=1),  # it writes the picture itself
}


class PromptWriter:
    """Writes prompts with pictures.

    With a chat template, a row is one user turn with its pictures and the prompt. Without one, its form is that of the
    processor: mostly `<image>` and a new line for each picture, the prompt and another new line. What an encoder reads
    ends without it.

    Args:
        processor: A transformers processor, or a tokenizer for a base without pictures.
        encoder: Whether an encoder reads the prompts, apart from the answers.
    """

    def __init__(self, processor: Any, *, encoder: bool = False) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.has_pictures = hasattr(processor, "image_processor")
        self.has_template = getattr(processor, "chat_template", None) is not None
        self.form = _FORMS.get(type(processor).__name__, Form("{pictures}{text}") if encoder else Form())
        self.placeholders = _placeholders(processor, self.tokenizer)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prompt(self, text: str, pictures: int = 1) -> str:
        """Return the text in front of the answer.

        Args:
            text: The prompt, without picture or template.
            pictures: How many pictures stand before it, where the base takes any.

        Raises:
            ValueError: The base takes fewer or more pictures, or the text holds what stands for one.
        """
        self._check(text, pictures)
        if self.has_template:
            return self.render([self.turn("user", text, pictures)], add_generation_prompt=True)
        token = str(getattr(self.processor, "image_token", "<image>"))
        shown = self.form.picture.format(token=token) * pictures if self.has_pictures else ""
        return self.form.text.format(pictures=shown, text=text)

    def prompt_tokens(self, texts: Sequence[str], images: Sequence[Sequence[Image]]) -> BatchFeature:
        """Return what the base takes for prompts, padded on the left.

        Args:
            texts: Prompts, without picture or template.
            images: Those of each prompt.

        Raises:
            ValueError: See `prompt`.
        """
        self._check_alike([len(own) for own in images])
        prompts = [self.prompt(text, len(own)) for text, own in zip(texts, images, strict=True)]
        start = self.tokenizer.bos_token
        given: dict[str, Any] = {}
        if self.has_template and start is not None and all(prompt.startswith(start) for prompt in prompts):
            given["add_special_tokens"] = False
        if self.has_pictures and any(images):
            given["images"] = [list(own) for own in images]
        tokens: BatchFeature = self.processor(
            text=prompts, padding=True, padding_side="left", return_tensors="pt", **given
        )
        return tokens

    def turn(self, role: str, text: str, pictures: int = 0) -> dict[str, Any]:
        """Return one turn of a conversation, as chat templates read it.

        Args:
            role: `user` or `assistant`.
            text: What is said.
            pictures: How many pictures stand before it.
        """
        if not self.has_pictures:
            return {"role": role, "content": text}
        return {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}

    def render(self, turns: list[dict[str, Any]], **options: Any) -> str:
        """Return a conversation as the base's template writes it.

        Args:
            turns: See `turn`.
            options: Of transformers' `apply_chat_template`.
        """
        rendered: str = self.processor.apply_chat_template(turns, tokenize=False, **options)
        return rendered

    def _check_alike(self, counts: Sequence[int]) -> None:
        if self.form.alike and len(set(counts)) > 1:
            raise ValueError(
                f"{type(self.processor).__name__} takes rows with equally many pictures in a batch, and this one has "
                f"rows with {', '.join(map(str, sorted(set(counts))))}; leave some out, or choose another base"
            )

    def _check(self, text: str, pictures: int) -> None:
        least, most = self.form.least, self.form.most
        if self.has_pictures and (pictures < least or (most is not None and pictures > most)):
            raise ValueError(
                f"{type(self.processor).__name__} takes {'at least' if most is None else 'exactly'} {least} picture a "
                f"row, and the row that asks {text!r} has {pictures}; leave such rows out, or choose another base"
            )
        held = [token for token in self.placeholders if token in text]
        if held:
            raise ValueError(
                f"the prompt {text!r} holds {held[0]}, which stands for a picture of this base; take it out of the "
                "text, since pictures are put before it by themselves"
            )


def _placeholders(processor: Any, tokenizer: Any) -> list[str]:
    """Return the tokens that stand for pictures, videos or sounds, or for patches of them."""
    found = [getattr(owner, f"{kind}_token", None) for owner in (processor, tokenizer) for kind in _MEDIA]
    return list(dict.fromkeys(str(token) for token in found if token is not None))
