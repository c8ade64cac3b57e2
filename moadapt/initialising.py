"""Starts that read data: adapters get their first weights from what enters their sites."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from moadapt.input_means import input_means
from moadapt.merging.calibration import Batch, as_batches
from moadapt.mixture import Mixture
from moadapt.sites import Site


def initialise(mixture: Mixture, batches: Batch | Iterable[Batch]) -> None:
    """Give adapters whose start reads data, such as `LoRA(init="eva")`, their first weights.

    Adapters that were initialised or loaded before stay as they are. `moadapt fit` does it by itself.

    Args:
        mixture: Whose adapters.
        batches: One batch or several of what the mixture takes; a few hundred rows like those to train on, or for
            `corda_preserve` like those whose knowledge is to be kept.

    Raises:
        ValueError: There is no batch, or none reached a site.
    """
    sites = waiting_sites(mixture)
    if sites:
        with mixture.bare_base() as base:
            means = input_means(base, sites, as_batches(batches))
        start(mixture, means)


def waiting_sites(mixture: Mixture) -> tuple[Site, ...]:
    """Return the sites where adapters wait for inputs to start from."""
    return tuple(dict.fromkeys(site for site, bank in mixture.banks() if bank.waiting))


def start(mixture: Mixture, means: Mapping[Site, Tensor]) -> None:
    """Start the adapters that wait.

    Args:
        mixture: Whose adapters.
        means: Of `input_means`, for all sites of `waiting_sites`.
    """
    for site, bank in mixture.banks():
        if bank.waiting:
            bank.start(means[site])
