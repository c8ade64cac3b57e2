"""`moadapt pretrain`: make a shipped base again."""

from pathlib import Path

from moadapt.registry import BASES


def pretrain(name: str, out: Path | None = None, work: Path | None = None, set: str = "") -> None:
    """Make a shipped base again, from its own recipe.

    Args:
        name: Short name of the base; see `moadapt list bases`.
        out: Folder to write; by default `base` in the folder of checkpoints.
        work: Folder for checkpoints, where a second call resumes; by default runs/pretrain/NAME.
        set: Numbers of the recipe to change, such as list_steps=100,seed=1.

    Raises:
        ValueError: The base, or a setting of its recipe, is unknown, or a setting is no number.
    """
    base = BASES.get(name)()
    work = work or Path("runs/pretrain") / name
    base.pretrain(out or work / "base", work, **dict(_setting(text) for text in set.split(",") if text))


def _setting(text: str) -> tuple[str, int | float]:
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    raise ValueError(f"--set {text} is no setting of a number; write NAME=NUMBER, joined by commas")
