"""What the names in the results mean, in plain words."""

from typing import NamedTuple


class RowWords(NamedTuple):
    """Words for one row of the results: a title, a short one for tight places, and a sentence."""

    title: str
    short: str
    meaning: str


ROWS = {
    "base": RowWords("Base model", "base", "The frozen model as it was. Nothing was trained on these tasks."),
    "single_lora": RowWords(
        "One LoRA for all tasks",
        "one LoRA",
        "A single LoRA adapter, trained on all tasks together and given at least as many trainable parameters as the "
        "mixture. It is not told the task.",
    ),
    "lora_per_task": RowWords(
        "One LoRA per task",
        "LoRA per task",
        "A LoRA adapter for each task, trained on that task alone. The task of every input has to be given.",
    ),
    "mixture": RowWords(
        "Mixture",
        "mixture",
        "A shared LoRA adapter beside one expert adapter per task. Routers decide how much of every expert an input "
        "gets.",
    ),
    "mixture_merged_per_task": RowWords(
        "Mixture merged, a model per task",
        "merged per task",
        "The mixture folded into plain models without router or adapters, one model for each task.",
    ),
    "mixture_merged": RowWords(
        "Mixture merged, one model",
        "merged",
        "The mixture folded into one plain model without router or adapters that serves all tasks.",
    ),
}

TASKS = {
    "vqa": "answer a question about the picture (visual question answering)",
    "captioning": "describe the picture",
    "grounding": "find what a phrase names and answer with a box around it",
}

TASK_TITLES = {"vqa": "Visual question answering", "captioning": "Captioning", "grounding": "Grounding"}


def row_words(name: str) -> RowWords:
    """Return the words for a row; an unknown one is called by its name.

    Args:
        name: The row's name.
    """
    return ROWS.get(name, RowWords(name, name, ""))


def task_title(name: str) -> str:
    """Return a task's heading.

    Args:
        name: The task's name.
    """
    return TASK_TITLES.get(name, name)


def spelled(number: int) -> str:
    """Write a small number as a word.

    Args:
        number: From 0.
    """
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[number] if number < len(words) else str(number)


def listed(words: list[str]) -> str:
    """Join words as a sentence does: `a, b and c`.

    Args:
        words: At least one.
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
