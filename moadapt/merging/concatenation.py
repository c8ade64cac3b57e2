"""Factors side by side, the `cat` of other libraries: `[w_1 B_1, ...] [A_1; ...]`, which is exactly `sum_e w_e DW_e`.

What those libraries call `svd` is this, cut to a rank afterwards: `merge("cat", rank=8)`. Their `linear`, which adds
the A's and the B's, is another function, with cross terms `B_i A_j` (relative error of two random adapters 0.8 to 0.9).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from moadapt.merging.method import Blend, MergeMethod, Merging
from moadapt.registry import MERGES


@MERGES.register("cat")
@dataclass(frozen=True, kw_only=True)
class Concatenation(MergeMethod):
    """Blends experts by weights that you choose, their ranks side by side.

    Args:
        weights: By name of the expert, others counting nothing; None for 1 each. Weights may be negative.
    """

    weights: Mapping[str, float] | None = None

    reads_rows: ClassVar[bool] = False

    def prepare(self, merging: Merging) -> Blend:
        """Order the weights.

        Raises:
            ValueError: An expert is unknown.
        """
        experts, given = merging.mixture.experts, self.weights
        unknown = sorted(set(given or {}) - set(experts))
        if unknown:
            raise ValueError(f"merge 'cat' has a weight for {unknown[0]!r}; the experts are {', '.join(experts)}")
        weights = merging.even(1.0)
        if given is not None:
            weights = torch.tensor([float(given.get(name, 0.0)) for name in experts])
        return Blend(merging.by_site({place.name: weights for place in merging.mixture.places}))
