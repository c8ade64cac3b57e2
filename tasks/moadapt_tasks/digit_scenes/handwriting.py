"""Real handwritten digits, split by sample, drawn at any size.

The digits are the 1,797 8x8 scans of the UCI optical recognition set that scikit-learn ships. A split owns its scans:
a scan of `test` is never drawn in `train`, so every test scene shows unseen handwriting.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

SPLITS = {"train": 1400, "validation": 97, "test": 300}
_SPLIT_SEED = 20
_INK = 0.3


@dataclass(frozen=True)
class Handwriting:
    """The scans of one split.

    Args:
        scans: Ink between 0 and 1, (samples, 8, 8).
        digits: The digit each scan shows, (samples,).
    """

    scans: NDArray[np.float32]
    digits: NDArray[np.int64]

    def glyph(self, digit: int, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """Draw one scan of a digit, slightly turned and stretched, cropped to its ink.

        Args:
            digit: 0 to 9.
            size: Side of the drawing before cropping, in pixels.
            rng: Source of the scan, the angle and the stretch.

        Returns:
            Ink between 0 and 1, (height, width), both at most `size`.
        """
        scan = self.scans[rng.choice(np.flatnonzero(self.digits == digit))]
        width = round(size * rng.uniform(0.8, 1.0))
        picture = Image.fromarray((scan * 255).astype(np.uint8))
        picture = picture.resize((width, size), Image.Resampling.BICUBIC)
        picture = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
        return crop(np.asarray(picture, dtype=np.float32) / np.float32(255))


def crop(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut a drawing to the smallest rectangle that holds its visible ink."""
    rows = np.flatnonzero((ink > _INK).any(axis=1))
    columns = np.flatnonzero((ink > _INK).any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@lru_cache(maxsize=3)
def handwriting(split: str) -> Handwriting:
    """Return the scans of a split.

    Args:
        split: `train`, `validation` or `test`.

    Raises:
        ValueError: No split has that name.
    """
    if split not in SPLITS:
        raise ValueError(f"no split of the handwriting is called {split!r}; there are {', '.join(SPLITS)}")
    scans, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits))
    start = sum(count for name, count in SPLITS.items() if list(SPLITS).index(name) < list(SPLITS).index(split))
    own = order[start : start + SPLITS[split]]
    return Handwriting(scans[own].reshape(-1, 8, 8).astype(np.float32) / 16, digits[own].astype(np.int64))
