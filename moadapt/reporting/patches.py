"""A picture that is stored once in the page and drawn under grids of patches."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from moadapt.reporting.markup import Markup, element
from moadapt.reporting.pictures import PIXEL_ART, embedded

_TOLERANCE = math.log(1.6)
_TOLD = 300
"""Most patches that each say their shares when pointed at; more would make the page heavy."""


def stored_picture(file: Any, name: str) -> tuple[Markup, tuple[int, int] | None]:
    """Return an invisible element that holds a picture for `patched`, and its width and height.

    Where the file cannot be read it is a note, and there is no size.

    Args:
        file: A picture file.
        name: Its address on the page; no other has it.
    """
    try:
        with Image.open(Path(str(file))) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError):
        return element("div", f"picture not found: {file}", class_="lost"), None
    small = "pixels" if max(image.size) <= PIXEL_ART else None
    kept = element("image", href=embedded(image), width=image.width, height=image.height, class_=small, id=name)
    return element("svg", element("defs", kept), width=0, height=0, class_="stored", aria_hidden="true"), image.size


def patched(
    name: str, size: tuple[int, int] | None, grid: tuple[int, int] | None, fills: Sequence[str], told: Sequence[str]
) -> Markup | None:
    """Draw a stored picture under coloured patches.

    Args:
        name: The picture's address.
        size: Its width and height; None where there is none.
        grid: Rows and columns of the patches; None draws the picture alone.
        fills: Style of each patch, row by row.
        told: What each says when pointed at.
    """
    if size is None:
        return None
    width, height = size
    cells: list[Markup] = []
    if grid is not None:
        rows, columns = grid
        wide, tall = width / columns, height / rows
        for index, (fill, words) in enumerate(zip(fills, told, strict=True)):
            row, column = divmod(index, columns)
            place = {"x": f"{column * wide:.3f}", "y": f"{row * tall:.3f}"}
            title = element("title", words) if len(fills) <= _TOLD else None
            cells.append(element("rect", title, style=fill, width=f"{wide:.3f}", height=f"{tall:.3f}", **place))
    drawn = element("use", href=f"#{name}")
    return element(
        "svg", drawn, *cells, class_="patched", viewBox=f"0 0 {width} {height}", role="img",
        aria_label="The picture" if grid is None else "Patches of the picture, coloured by expert",
    )  # fmt: skip


def grid_of(count: int, width: int, height: int) -> tuple[int, int] | None:
    """Return the rows and columns of so many patches that suit a picture's shape; None where none do.

    Args:
        count: How many patches.
        width: Of the picture.
        height: Of the picture.

    Example:
        >>> grid_of(49, 56, 56), grid_of(24, 60, 40), grid_of(50, 56, 56), grid_of(0, 56, 56)
        ((7, 7), (4, 6), None, None)
    """
    found = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    best = min(found, key=lambda grid: _misfit(grid, width, height), default=None)
    return best if best is not None and _misfit(best, width, height) < _TOLERANCE else None


def _misfit(grid: tuple[int, int], width: int, height: int) -> float:
    rows, columns = grid
    return abs(math.log(columns * height / (rows * width)))
