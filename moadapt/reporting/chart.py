"""Charts as inline SVG that takes its colours and its font from the page, so that they follow the reader's theme."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moadapt.reporting.markup import Markup, element
from moadapt.reporting.palette import INK, MUTED, RULE, SHADES

Draw = Callable[[Axes], None]

_PIXELS = 72  # matplotlib's SVG has this many units an inch
STYLE: Any = {  # some releases of matplotlib type the keys
    "svg.fonttype": "none",
    "svg.hashsalt": "moadapt",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 11,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE.light,
    "axes.labelcolor": MUTED.light,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "axes.titlecolor": INK.light,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK.light,
    "grid.color": RULE.light,
    "grid.linewidth": 0.7,
    "xtick.color": RULE.light,
    "ytick.color": RULE.light,
    "xtick.labelcolor": MUTED.light,
    "ytick.labelcolor": MUTED.light,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}
_VARIABLES = {shade.light: f"var({shade.variable})" for shade in SHADES}
_COLOUR = re.compile("|".join(map(re.escape, _VARIABLES)))
_FONT = re.compile(r"font: (?:\w+ )*([\d.]+px)[^;\"]*")
_FAMILY = re.compile(r"font-family: [^;\"]*;? ?")
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL)
_IDENTITY = re.compile(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)')


def chart(draw: Draw, *, width: float, height: float, name: str, label: str) -> Markup:
    """Draw one pair of axes as an `svg` element.

    Args:
        draw: Fills the axes.
        width: In pixels of the page, where there is room for them.
        height: In the same pixels.
        name: Letters, digits and hyphens; no other chart of the page has it.
        label: What the chart shows, for those who cannot see it.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the reader's own font writes the text
        figure = Figure(figsize=(width / _PIXELS, height / _PIXELS), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = file.getvalue()
    opening, inner = re.split(r"(?<=>)", drawn[drawn.index("<svg") : drawn.rindex("</svg>")], maxsplit=1)
    box = re.search(r'viewBox="([^"]*)"', opening)
    assert box, "matplotlib writes a viewBox"
    inner = _DROPPED.sub("", inner)
    content = Markup(re.sub(r"<[^>]+>", lambda tag: _themed(tag[0], name), inner))
    return element("svg", content, class_="chart", viewBox=box[1], role="img", aria_label=label)


def _themed(tag: str, name: str) -> str:
    """Give one tag the page's colours and font, and identities that no other chart has."""
    tag = _FAMILY.sub("", tag)
    tag = _FONT.sub(r"font-size: \1", _COLOUR.sub(lambda found: _VARIABLES[found[0]], tag))
    return _IDENTITY.sub(f"{name}-", tag)
