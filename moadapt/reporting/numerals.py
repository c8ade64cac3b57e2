"""Numbers as the page writes them. A value that is missing or not finite is a dash."""

import math
from typing import Any

MISSING = "\N{EN DASH}"


def known(value: Any) -> bool:
    """Return whether a value is a finite number.

    Args:
        value: Anything.
    """
    return isinstance(value, int | float) and math.isfinite(value)


def fixed(value: Any, digits: int = 2) -> str:
    """Write a number with fixed decimals.

    Args:
        value: A number, or None.
        digits: Decimals, from 0.
    """
    return f"{value:.{digits}f}" if known(value) else MISSING


def percent(value: Any, digits: int = 1) -> str:
    """Write a share of one as a percentage.

    Args:
        value: 0 to 1, or None.
        digits: Decimals, from 0.
    """
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%" if known(value) else MISSING


def count(value: Any) -> str:
    """Write a whole number in groups of three digits.

    Args:
        value: A whole number, or None.
    """
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}") if known(value) else MISSING


def signed(value: float, digits: int) -> str:
    """Write a difference with its sign; one that rounds to nothing is `±0`.

    Args:
        value: The difference.
        digits: Decimals, from 0.
    """
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return f"{'+' if value > 0 else chr(0x2212)}{text}"


def small(value: Any) -> str:
    """Write a number of any size with two significant digits.

    Args:
        value: A number, or None.
    """
    if not known(value):
        return MISSING
    return "0" if value == 0 else f"{value:.2g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.0e}"


def duration(seconds: Any) -> str:
    """Write a time in the units one would say.

    Args:
        seconds: From 0, or None.
    """
    if not known(seconds):
        return MISSING
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
