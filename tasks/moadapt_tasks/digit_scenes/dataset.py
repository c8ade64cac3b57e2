"""The digit scenes as a data set: writes its files once and knows the three tasks that read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moadapt.registry import DATASETS
from moadapt.task import SPLITS, Dataset, Task
from moadapt_tasks.captioning import Captioning
from moadapt_tasks.digit_scenes.files import SplitSettings, write_split
from moadapt_tasks.grounding import Grounding
from moadapt_tasks.vqa import VQA


@DATASETS.register("digit_scenes")
@dataclass(frozen=True, kw_only=True)
class DigitScenes(Dataset):
    """Questions, captions and referring expressions about scenes of real handwritten digits.

    Args:
        root: Folder of the splits' folders.
        train: Scenes to train on.
        validation: Scenes to choose by; their handwriting is in no other split.
        test: Scenes to report on; their handwriting is in no other split.
        questions: Questions a scene.
        expressions: Referring expressions a scene.
        seed: Another seed is another data set, from 0.

    Raises:
        ValueError: A number is out of range.
    """

    root: str = "data/digit_scenes"
    train: int = 4000
    validation: int = 200
    test: int = 300
    questions: int = 4
    expressions: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in {**dict.fromkeys([*SPLITS, "questions", "expressions"], 1), "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give at least {least}")

    def prepare(self) -> Mapping[str, Task]:
        """Write the splits that are not there with these numbers yet, and return `vqa`, `captioning`, `grounding`.

        Raises:
            ValueError: A split's folder holds something else.
        """
        for split in SPLITS:
            numbers = SplitSettings(split, getattr(self, split), self.questions, self.expressions, self.seed)
            write_split(Path(self.root) / split, numbers)
        folder = self.root.replace("{", "{{").replace("}", "}}") + "/{split}"
        return {
            "vqa": VQA(
                questions=f"{folder}/questions.json",
                annotations=f"{folder}/annotations.json",
                images=folder + "/images/{image_id:06d}.png",
            ),
            "captioning": Captioning(captions=f"{folder}/captions.json", images=folder + "/images/{file_name}"),
            "grounding": Grounding(
                refs=f"{folder}/refs.json",
                instances=f"{folder}/instances.json",
                images=folder + "/images/{file_name}",
            ),
        }
