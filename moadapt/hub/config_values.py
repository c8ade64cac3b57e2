"""Values of a stranger's configuration, each checked for the type and size that it can have."""

from collections.abc import Mapping
from typing import Any


class ConfigValues:
    """A configuration whose values are checked when they are asked for; a wrong one is a ValueError that says so.

    Args:
        config: What the file says.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def count(self, name: str) -> int:
        """Return a whole number above 0, 8 by default as in peft."""
        return self.as_count(name, self._config.get(name, 8))

    def number(self, name: str) -> float:
        """Return a finite number, 8 by default as in peft."""
        return self.as_number(name, self._config.get(name, 8))

    def flag(self, name: str) -> bool:
        """Return whether a setting is true."""
        value = self._config.get(name, False)
        return bool(self._checked(name, value, value is None or isinstance(value, bool), "true or false"))

    def share(self, name: str) -> float:
        """Return a number between 0 and 1, 0 by default."""
        value = self.as_number(name, self._config.get(name) or 0.0)
        return float(self._checked(name, value, 0 <= value <= 1, "a share between 0 and 1"))

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        """Return one of several values, the first by default."""
        value = self._config.get(name, known[0])
        return str(self._checked(name, value, value in known, f"one of {', '.join(known)}"))

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a mapping, empty by default."""
        value = self._config.get(name) or {}
        return dict(self._checked(name, value, isinstance(value, dict), "a mapping from names"))

    def names(self, name: str, *, pattern: bool = False) -> str | tuple[str, ...]:
        """Return names, or one text where that is a pattern."""
        value = self._config.get(name) or ()
        if isinstance(value, str):
            return value if pattern else (value,)
        right = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        return tuple(self._checked(name, value, right, "a list of names"))

    def indices(self, name: str) -> tuple[int, ...] | None:
        """Return whole numbers; None where none are given."""
        value = self._config.get(name)
        if value is None or value == []:
            return None
        found = value if isinstance(value, list) else [value]
        return tuple(self._checked(name, found, all(type(each) is int for each in found), "a list of indices"))

    def as_count(self, name: str, value: Any) -> int:
        """Check that a value is a whole number above 0."""
        return int(self._checked(name, value, type(value) is int and 0 < value < 2**20, "a whole number above 0"))

    def as_number(self, name: str, value: Any) -> float:
        """Check that a value is a finite number."""
        right = type(value) in (int, float) and abs(value) < 1e9
        return float(self._checked(name, value, right, "a finite number"))

    def _checked(self, name: str, value: Any, right: bool, wanted: str) -> Any:
        if not right:
            raise ValueError(f"adapter_config.json has {name}={str(value)[:80]}; it must be {wanted}")
        return value
