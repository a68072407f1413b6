"""Source ``digits``: scikit-learn's 1,797 real handwritten digits, 8x8 gray, from its wheel. Nothing is downloaded."""

import dataclasses
import functools

import numpy as np

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError
from pipeline.manifest import ClassRecord
from pipeline.sources.listing import Item, Listing, Source, SplitListing
from pipeline.sources.split import shuffled

NUM_TRAIN = 1437  # 80 % of 1,797, the rest (360) is val


@dataclasses.dataclass(frozen=True)
class DigitsSource(Source):
    """The digits, split by a seeded shuffle.

    Attributes:
        seed: seed of the split.
    """

    seed: int

    def listing(self) -> Listing:
        """1,437 train and 360 val images of ten classes."""
        _, labels = _digits()
        order = shuffled(len(labels), self.seed, "digits split")
        rows = {"train": np.sort(order[:NUM_TRAIN]), "val": np.sort(order[NUM_TRAIN:])}
        return Listing(
            classes=tuple(ClassRecord(name=str(digit), title=str(digit)) for digit in range(10)),
            label_order="source",
            splits={split: _columns(chosen, labels) for split, chosen in rows.items()},
            encoded=False,
            channels=1,
        )

    def read(self, item: Item) -> np.ndarray:
        """One digit, uint8 (8, 8, 1); the scanner's 17 levels spread over 0..255 without loss."""
        images, _ = _digits()
        return np.rint(images[item.offset] * (255 / 16)).astype(np.uint8)[..., None]


def from_options(options: PrepareOptions) -> DigitsSource:
    """Makes the source; it takes no input."""
    if options.input is not None:
        raise ConfigError(f"--input {options.input}: source digits brings its own images; leave --input out")
    return DigitsSource(seed=options.seed)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) float 0..16 and labels (1797,)."""
    import sklearn.datasets  # slow to import, and needed by this source only

    data = sklearn.datasets.load_digits()
    return data.images, data.target


def _columns(rows: np.ndarray, labels: np.ndarray) -> SplitListing:
    return SplitListing(
        names=[f"digits/{row:04d}" for row in rows],
        labels=labels[rows].astype(np.int32),
        files=("digits",),
        file_of=np.zeros(len(rows), np.int32),
        offsets=rows.astype(np.int64),
        sizes=np.full(len(rows), 64, np.int64),
    )
