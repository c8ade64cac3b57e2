"""A picture of the ranks of a mixture: a heat map of module by layer for each adapter and tower."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from moadapt.mixture_spec import MixtureSpec
from moadapt.ranks.allocator import ranks_of
from moadapt.reporting.palette import ACCENT, GROUND, INK, MUTED
from moadapt.sites import Anatomy, Site

Table = tuple[list[str], list[str], np.ndarray[tuple[int, int], np.dtype[np.float64]]]
"""Names of modules, those of layers, and the ranks between."""
_CELL, _HEAD = 0.42, 0.75  # inches
_COLOURS = LinearSegmentedColormap.from_list("ranks", [GROUND.light, ACCENT.light])


def save_rank_picture(spec: MixtureSpec, found: Anatomy, file: str | Path) -> None:
    """Draw the ranks of a mixture's LoRAs to a file, `.png`, `.svg` or `.pdf`.

    Args:
        spec: Of the mixture.
        found: Anatomy of its base.
        file: Replaced if it is there.

    Raises:
        ValueError: No adapter has ranks.
    """
    ranks = ranks_of(spec, found)
    if not ranks:
        raise ValueError("no adapter has ranks; only LoRAs have")
    towers = list(dict.fromkeys(site.tower for own in ranks.values() for site in own))
    tables = {
        (tower, name): _table({site: rank for site, rank in own.items() if site.tower == tower}, found)
        for tower in towers
        for name, own in ranks.items()
    }
    most = max(1, *(rank for own in ranks.values() for rank in own.values()))
    heights = [_HEAD + _CELL * max(len(tables[tower, name][0]) for name in ranks) for tower in towers]
    widest = max(len(layers) for _, layers, _ in tables.values())
    size = ((1.8 + _CELL * widest) * len(ranks), sum(heights))
    figure = Figure(figsize=size, layout="constrained", facecolor=GROUND.light)
    grid = figure.subplots(len(towers), len(ranks), squeeze=False, gridspec_kw={"height_ratios": heights})
    for ((tower, name), table), axes in zip(tables.items(), grid.flat, strict=True):
        _draw(axes, f"{name}, {tower}", table, most, widest)
    figure.savefig(file, dpi=150)


def _table(ranks: Mapping[Site, int], found: Anatomy) -> Table:
    """Return the names of modules, those of layers, and the ranks between, not a number where there is no site."""
    names = list(dict.fromkeys(_module(site, found) for site in ranks))
    layers = sorted({site.layer for site in ranks}, key=lambda layer: -1 if layer is None else layer)
    values = np.full((len(names), len(layers)), np.nan)
    for site, rank in ranks.items():
        values[names.index(_module(site, found)), layers.index(site.layer)] = rank
    return names, ["" if layer is None else str(layer) for layer in layers], values


def _module(site: Site, found: Anatomy) -> str:
    """Return a site's path within its block, or its tower."""
    tower = found.tower(site.tower)
    return site.path.removeprefix(tower.path if site.layer is None else tower.blocks[site.layer]).strip(".")


def _draw(axes: Axes, title: str, table: Table, most: int, widest: int) -> None:
    names, layers, values = table
    if not names:
        axes.set_axis_off()
        return
    axes.set_facecolor(GROUND.light)
    axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=most, aspect="equal")
    for (row, column), rank in np.ndenumerate(values):
        if not np.isnan(rank):
            colour = MUTED.light if rank == 0 else GROUND.light if rank > most / 2 else INK.light
            axes.text(column, row, f"{rank:.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_title(f"{title}: {np.nansum(values):.0f}", loc="left", fontsize=10, color=INK.light)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(-0.5, widest - 0.5)
    axes.set_xlabel("layer" if any(layers) else "", fontsize=9, color=MUTED.light)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK.light)
    axes.spines[:].set_visible(False)
    axes.set_anchor("W")
