"""Names of adapters: safe as a folder, a key and a word in a log."""

import re
from collections.abc import Iterable

SHARED = "shared"
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def check_names(names: Iterable[str]) -> None:
    """Refuse names that some file format or tool would misread.

    Args:
        names: Names of experts, which are also names of tasks.

    Raises:
        ValueError: A name is empty, too long, holds a character other than letters, digits, `_` and `-`, or is taken.
    """
    for name in names:
        if not isinstance(name, str) or not _SAFE.fullmatch(name):
            raise ValueError(
                f"adapter name {name!r} is refused; use 1 to 64 letters, digits, underscores and hyphens, not "
                "starting with a hyphen"
            )
        if name == SHARED:
            raise ValueError(f"adapter name {SHARED!r} belongs to the shared adapter; choose another")
