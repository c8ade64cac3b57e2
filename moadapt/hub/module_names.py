"""Modules of a base under the names that files of adapters have for them.

Those of older versions of transformers are translated by its own table of conversions, the one by which it reads old
checkpoints. Beside it there are names with and without the base's own prefix, and names whose dots became underscores.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

_SPOKEN = re.compile(r"lora_[a-z0-9]+_|lora_")
_DIFFUSERS = ("text_encoder.", "text_encoder_2.", "transformer.", "unet.")


@dataclass
class ModuleNames:
    """The modules of one base.

    Args:
        base: Without a mixture on it.
    """

    base: PreTrainedModel
    _found: dict[str, str] = field(default_factory=dict)

    def find(self, written: str) -> str:
        """Return the path that a module has in this base.

        Args:
            written: Its path as a file has it.

        Raises:
            ValueError: There is none, or transformers stores it in another form now.
        """
        if written not in self._found:
            self._found[written] = self._find(written)
        return self._found[written]

    def _find(self, written: str) -> str:
        if written in self._paths:
            return written
        renamed = self._renamed(written)
        for name in (*self._spellings(written), *self._spellings(renamed), renamed):
            if name in self._paths:
                return name
        spoken = self._spoken.get(_SPOKEN.sub("", written, count=1).replace(".", "_"), [])
        if len(spoken) == 1:
            return spoken[0]
        if spoken:
            raise ValueError(f"{written} may be {' or '.join(spoken)}; ask for a file in peft's form")
        converter = next((c for c in self._converters if c.rename_source_key(f"{renamed}.weight")[1]), None)
        if converter is not None:
            raise ValueError(
                f"transformers no longer keeps {written} as a module of its own ({converter.target_patterns[0]}), "
                "where no LoRA of it fits; use the version that it was trained with"
            )
        raise ValueError(f"{type(self.base).__name__} has no module {written}")

    def _spellings(self, name: str) -> Iterator[str]:
        """Give a name with and without what comes before it in other classes for the same base."""
        prefix = f"{self.base.base_model_prefix}."
        for other in (name, *(name.removeprefix(p) for p in _DIFFUSERS if name.startswith(p))):
            if other != name:
                yield other
            if prefix != ".":
                yield prefix + other
                yield other.removeprefix(prefix)

    def _renamed(self, written: str) -> str:
        name = f"{written}.weight"
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name.removesuffix(".weight")

    @property
    def count(self) -> int:
        """How many modules there are."""
        return len(self._paths)

    @cached_property
    def _paths(self) -> frozenset[str]:
        return frozenset(path for path, _ in self.base.named_modules() if path)

    @cached_property
    def _spoken(self) -> dict[str, list[str]]:
        """Paths by how they read with underscores in the place of dots, with and without the base's own prefix."""
        found: dict[str, list[str]] = {}
        prefix = f"{self.base.base_model_prefix}."
        for path in sorted(self._paths):
            for name in {path, path.removeprefix(prefix)}:
                found.setdefault(name.replace(".", "_"), []).append(path)
        return found

    @cached_property
    def _conversions(self) -> list[WeightTransform]:
        return get_model_conversion_mapping(self.base)

    @property
    def _renamings(self) -> list[WeightRenaming]:
        return [each for each in self._conversions if isinstance(each, WeightRenaming)]

    @property
    def _converters(self) -> list[WeightConverter]:
        return [each for each in self._conversions if isinstance(each, WeightConverter)]
