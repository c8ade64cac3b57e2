"""Colours of the page. A run has the same colour everywhere, and all stay apart for colour-blind readers.

The hues are close to those of Okabe and Ito, "Color Universal Design" (2008), darkened on light ground and lightened on
dark. Charts are drawn with the light ones, and each is then replaced by the variable that follows the reader's theme.
"""

from typing import NamedTuple


class Shade(NamedTuple):
    """One colour: its variable in the style sheet, and its value on light and on dark ground."""

    variable: str
    light: str
    dark: str


INK = Shade("--ink", "#1d2126", "#e4e7ea")
MUTED = Shade("--muted", "#5c6670", "#9ca6b0")
RULE = Shade("--rule", "#d9dde1", "#363c43")
GROUND = Shade("--ground", "#fdfdfc", "#15181b")
RAISED = Shade("--raised", "#f4f5f5", "#1e2226")
ACCENT = Shade("--accent", "#2a628f", "#4386bb")
ON_ACCENT = Shade("--on-accent", "#fffffe", "#ffffff")
RIGHT = Shade("--right", "#0a7d5a", "#3ecb9b")
WRONG = Shade("--wrong", "#b8421a", "#ff9566")
OTHER = Shade("--run-other", "#78716a", "#aca59e")

RUNS = {
    "base": Shade("--run-base", "#717982", "#a3acb5"),
    "single_lora": Shade("--run-single", "#c27c00", "#efb04a"),
    "lora_per_task": Shade("--run-each", "#00936b", "#34cfa0"),
    "mixture": Shade("--run-mixture", "#0069a8", "#4fa8e8"),
    "mixture_merged_per_task": Shade("--run-merged-each", "#459fd1", "#a3d6f5"),
    "mixture_merged": Shade("--run-merged", "#a84a86", "#e08fc4"),
}

EXPERTS = (
    Shade("--expert-0", "#0a6ea9", "#53ade9"),
    Shade("--expert-1", "#c98200", "#f0b552"),
    Shade("--expert-2", "#079870", "#3ad2a4"),
    Shade("--expert-3", "#b0508d", "#e295c8"),
    Shade("--expert-4", "#c4521f", "#ff9d70"),
    Shade("--expert-5", "#5a56b5", "#a7a4f2"),
    Shade("--expert-6", "#7d7a00", "#cfcb45"),
    Shade("--expert-7", "#4aa3d4", "#a9d9f7"),
)
"""Colours of experts; more than these share them in turn."""

SHADES = (INK, MUTED, RULE, GROUND, RAISED, ACCENT, ON_ACCENT, RIGHT, WRONG, OTHER, *RUNS.values(), *EXPERTS)


def shade_of(run: str) -> Shade:
    """Return the colour of a run or of a row of the table.

    Args:
        run: Its name; unknown ones share a grey.
    """
    return RUNS.get(run, OTHER)


def expert_shade(index: int) -> Shade:
    """Return the colour of an expert.

    Args:
        index: Which one.
    """
    return EXPERTS[index % len(EXPERTS)]


def variables(*, dark: bool) -> str:
    """Return the declarations of all colours for one theme.

    Args:
        dark: Which theme.
    """
    return "".join(f"{shade.variable}:{shade.dark if dark else shade.light};" for shade in SHADES)
