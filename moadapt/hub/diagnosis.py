"""What becomes of every key of a foreign adapter, as values: the doctor prints them, and `compose` refuses by them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Fate = Literal["mapped", "renamed", "converted", "checked", "refused"]
FATES: dict[Fate, str] = {
    "mapped": "taken as it is, at the module of that name",
    "renamed": "taken as it is, at a module whose name was another one in the file",
    "converted": "taken in another form, as said",
    "checked": "a copy of what the base has, compared and left out",
    "refused": "not taken, and nothing of the adapter is",
}


@dataclass(frozen=True)
class KeyFate:
    """What becomes of one tensor.

    Args:
        key: Its name in the file.
        fate: One of `FATES`.
        target: Path of the module of the base that it belongs to, as far as it is known.
        why: How it was converted, or why it was refused.
    """

    key: str
    fate: Fate
    target: str | None = None
    why: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What becomes of an adapter.

    Args:
        source: Folder, file or hub name.
        kind: What it is, such as `LORA`; empty where that could not be told.
        keys: Fate of every tensor of the files.
        refusals: Why the adapter as a whole is refused.
        notes: What else is worth knowing, such as modules that stay as they are.
    """

    source: str
    kind: str = ""
    keys: tuple[KeyFate, ...] = ()
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether anything is refused, and with it the adapter."""
        return bool(self.refusals) or any(key.fate == "refused" for key in self.keys)

    @property
    def counts(self) -> dict[str, int]:
        """Number of keys by fate."""
        found = Counter(key.fate for key in self.keys)
        return {fate: found[fate] for fate in FATES if found[fate]}

    def check(self) -> None:
        """Refuse an adapter of which anything is refused.

        Raises:
            ValueError: It is; the first reasons are said.
        """
        if not self.refused:
            return
        reasons = list(self.refusals)
        reasons += [f"{key.key}: {key.why}" for key in self.keys if key.fate == "refused"]
        more = f"; and {len(reasons) - 3} more, see `moadapt doctor`" if len(reasons) > 3 else ""
        raise ValueError(f"{self.source} is refused: {'; '.join(reasons[:3])}{more}")

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        keys = [{"key": k.key, "fate": k.fate, "target": k.target, "why": k.why} for k in self.keys]
        return {
            "source": self.source,
            "kind": self.kind,
            "refused": self.refused,
            "counts": self.counts,
            "refusals": list(self.refusals),
            "notes": list(self.notes),
            "keys": keys,
        }


@dataclass
class Findings:
    """What is known so far of an adapter that is being looked at.

    Args:
        source: Folder, file or hub name.
    """

    source: str
    kind: str = ""
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _keys: dict[str, KeyFate] = field(default_factory=dict)

    def tell(self, keys: Iterable[str], fate: Fate, target: str | None = None, why: str = "") -> None:
        """Tell the fate of tensors; what was refused stays so.

        Args:
            keys: Their names in the file.
            fate: What becomes of them.
            target: Path of their module.
            why: How, or for what reason.
        """
        for key in keys:
            if key not in self._keys or self._keys[key].fate != "refused":
                self._keys[key] = KeyFate(key, fate, target, why)

    def refuse(self, keys: Iterable[str], why: str, target: str | None = None) -> None:
        """Refuse tensors; a reason from before stays."""
        self.tell(keys, "refused", target, why)

    def diagnosis(self) -> Diagnosis:
        """Return it all as a value."""
        return Diagnosis(self.source, self.kind, tuple(self._keys.values()), tuple(self.refusals), tuple(self.notes))
