"""Names of modules matched by regular expressions of a stranger, which may be made to take for ever.

peft's own matching has no limit of time; here all patterns of an adapter have one together.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import regex

_SECONDS = 0.2
"""Of the processor, for all patterns of an adapter together; honest ones take thousandths of it."""


@dataclass
class Patterns:
    """Matches names by patterns of a stranger, all of them together in a limited time.

    Args:
        left: Seconds left.
    """

    left: float = _SECONDS

    def match(self, pattern: str, name: str) -> bool:
        """Tell whether a whole name matches a regular expression.

        Raises:
            ValueError: The expression is none, or takes too long.
        """
        began = time.process_time()
        try:
            if self.left <= 0:
                raise TimeoutError
            found = regex.fullmatch(pattern, name, timeout=self.left)
        except (regex.error, RecursionError) as error:
            raise ValueError(f"its pattern {pattern[:80]!r} is no regular expression: {error}") from error
        except TimeoutError as error:
            self.left = 0
            raise ValueError(f"its pattern {pattern[:80]!r} takes too long to match, as no honest one does") from error
        self.left -= time.process_time() - began
        return found is not None

    def find(self, patterns: Iterable[str], paths: Iterable[str]) -> str | None:
        """Return the first pattern that matches a path or its last names, as peft looks up ranks; None without any."""
        known = tuple(paths)
        return next((p for p in patterns for path in known if p == path or self.match(rf"(.*\.)?({p})", path)), None)
