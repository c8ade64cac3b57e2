"""Pictures of the data, embedded in the page, with boxes drawn over them."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from moadapt.reporting.markup import Markup, element

Box = Sequence[float]
"""Left, top, right, bottom in pixels, the last two exclusive."""

PIXEL_ART = 128
"""Longest side, in pixels, of pictures that are enlarged without smoothing."""
_LARGEST = 480


class Outline(NamedTuple):
    """A box to draw: where, as what, which class it has besides, and its colour if not white."""

    box: Box
    kind: str
    name: str
    colour: str | None


def picture(file: Any, outlines: Sequence[Outline], *, alt: str) -> Markup:
    """Return a picture with boxes over it; a note where the file cannot be read.

    Args:
        file: A picture file.
        outlines: Boxes, the last on top.
        alt: What it is, for those who cannot see it.
    """
    try:
        with Image.open(Path(str(file))) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError):
        return element("div", f"picture not found: {file}", class_="lost")
    width, height = image.size
    small = max(width, height) <= PIXEL_ART
    drawn = element("image", href=embedded(image), width=width, height=height, class_="pixels" if small else None)
    boxes = [part for outline in outlines for part in _outlined(outline)]
    return element("svg", drawn, *boxes, class_="picture", viewBox=f"0 0 {width} {height}", role="img", aria_label=alt)


def overlap(first: Box, second: Box) -> float:
    """Return the intersection of two boxes over their union, 0 to 1.

    Args:
        first: A box.
        second: Another.
    """
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, across) * max(0.0, down)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0


def embedded(image: Image.Image) -> str:
    """Return a picture as an address that holds it, made smaller where it is large.

    Args:
        image: The picture.
    """
    image = image.copy()
    image.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _outlined(outline: Outline) -> list[Markup]:
    """Return a box twice: a wide dark line, then the coloured one, to stand out on any ground."""
    left, top, right, bottom = outline.box
    place = {"x": left, "y": top, "width": max(0.0, right - left), "height": max(0.0, bottom - top)}
    style = f"stroke:{outline.colour}" if outline.colour else None
    return [
        element("rect", class_=f"halo {outline.kind} {outline.name}".strip(), **place),
        element("rect", class_=f"line {outline.kind} {outline.name}".strip(), style=style, **place),
    ]
