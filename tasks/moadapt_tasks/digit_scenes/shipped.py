"""The digit-scene base under its short name: the shipped folder, and the recipe that makes it again."""

from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from moadapt.bases import ShippedBase
from moadapt.registry import BASES
from moadapt_tasks.digit_scenes.pretrain import pretrain
from moadapt_tasks.digit_scenes.recipe import PretrainSettings


@BASES.register("digit_scenes")
class DigitScenesBase(ShippedBase):
    """A LLaVA of 1.8 million parameters that lists what is where in a digit scene, and does nothing else."""

    def folder(self) -> Path:
        """Return the folder beside this package's modules.

        Raises:
            ValueError: It is not there.
        """
        folder = Path(str(files("moadapt_tasks.digit_scenes"))) / "weights"
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no base; make it with `moadapt pretrain digit_scenes --out {folder}`")
        return folder

    def pretrain(self, out: Path, work: Path, **settings: int | float) -> None:
        """Make the weights again; see `ShippedBase.pretrain`.

        Raises:
            ValueError: The recipe has no such setting.
        """
        known = [field.name for field in fields(PretrainSettings)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"the recipe has no {', '.join(unknown)}; it has {', '.join(known)}")
        pretrain(out, PretrainSettings(**cast(dict[str, Any], settings)), work)
