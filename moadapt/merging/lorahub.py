"""Weights that a search without gradients finds on a few rows, the search being that of the router of this name.

Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition".
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moadapt.fitting import loss_of_weights
from moadapt.merging.method import Blend, MergeMethod, Merging
from moadapt.registry import MERGES, ROUTERS
from moadapt.specs import bind


@MERGES.register("lorahub")
@dataclass(frozen=True, kw_only=True)
class LoRAHubMerge(MergeMethod):
    """Searches the weights of the experts that lose least on a few rows, without gradients; needs nevergrad.

    Args:
        steps: How many weights are tried, at least 1; each costs one pass over the rows.
        bound: Largest size of a weight, above 0; weights may be negative.
        penalty: What the mean size of the weights costs, in nats.
        seed: Of the search.
    """

    steps: int = 40
    bound: float = 1.5
    penalty: float = 0.05
    seed: int = 0

    always_reads_rows: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    def prepare(self, merging: Merging) -> Blend:
        """Search."""
        mixture, options = merging.mixture, vars(self)
        spec: Any = bind(ROUTERS.get("lorahub"), options)
        with torch.no_grad():
            found = spec.search(lambda w: loss_of_weights(mixture, merging.rows, w), len(mixture.experts))
        return Blend(merging.by_site({place.name: found for place in mixture.places}))
