"""Logs how much adapters overlap at each validation: numbers, and a picture beside the checkpoint."""

from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from moadapt.mixture import Mixture
from moadapt.objectives.overlap import Measure, overlaps
from moadapt.reporting.overlaps import Matrix, overlap_picture
from moadapt.training.mixture_module import MixtureModule

MEASURES: tuple[Measure, ...] = ("deltas", "subspaces")


class LogOverlaps(Callback):
    """Logs `overlap/deltas` and `overlap/subspaces`, means over pairs and sites, and draws `overlaps.png`.

    Does nothing where no two adapters of low-rank form share a site.

    Args:
        folder: Where the picture goes, made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log and draw."""
        if trainer.sanity_checking or not isinstance(pl_module, MixtureModule):
            return
        mixture = pl_module.mixture
        names = tuple(adapter.name for adapter in mixture.spec.adapters())
        sites = {measure: _by_site(mixture, measure, names) for measure in MEASURES}
        if all(np.isnan(matrix).all() for matrix in sites["deltas"].values()):
            return
        for measure, found in sites.items():
            pl_module.log(f"overlap/{measure}", _mean(list(found.values())))
        if trainer.is_global_zero:
            self._draw(mixture, names, sites)

    def _draw(self, mixture: Mixture, names: tuple[str, ...], sites: dict[Measure, dict[str, Matrix]]) -> None:
        layers: dict[str, list[str]] = {}
        for site in mixture.sites:
            if not np.isnan(sites["deltas"].get(site.path, np.array(np.nan))).all():
                place = site.tower if site.layer is None else f"{site.tower} {site.layer}"
                layers.setdefault(place, []).append(site.path)
        picture = overlap_picture(
            names,
            {measure: _mean_matrix(list(found.values())) for measure, found in sites.items()},
            list(layers),
            {m: [_mean([found[path] for path in paths]) for paths in layers.values()] for m, found in sites.items()},
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.savefig(self.folder / "overlaps.png", dpi=110)


def _by_site(mixture: Mixture, measure: Measure, names: tuple[str, ...]) -> dict[str, Matrix]:
    """Return for each site the overlap of every two different adapters of the mixture, NaN where one is not there."""
    found = {}
    for path, (here, matrix) in overlaps(mixture, measure).items():
        whole = np.full((len(names), len(names)), np.nan)
        places = [names.index(name) for name in here]
        whole[np.ix_(places, places)] = matrix.double().cpu().numpy()
        np.fill_diagonal(whole, np.nan)
        found[path] = whole
    return found


def _mean(matrices: list[Matrix]) -> float:
    stacked = np.stack(matrices)
    return float(stacked[~np.isnan(stacked)].mean())


def _mean_matrix(matrices: list[Matrix]) -> Matrix:
    stacked = np.stack(matrices)
    present = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        mean: Matrix = np.where(present, stacked, 0).sum(axis=0) / present.sum(axis=0)
    return mean
