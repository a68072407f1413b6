"""What a run keeps of its loader: which batch is next, and what must be equal for it to mean the same samples."""

from typing import Any

from pipeline.errors import DatasetError
from pipeline.loader.config import LoaderConfig
from pipeline.loader.open_split import OpenSplit, describe_keys
from pipeline.loader.order import Order

_FORMAT = 3


def identity(split: OpenSplit, config: LoaderConfig, order: Order) -> dict[str, Any]:
    """What must be equal for a state to mean the same samples; the recipe's other fields may change in mid-run."""
    return {
        "format": _FORMAT,
        "data set": split.manifest.fingerprint,
        "skipped keys": describe_keys(split.skipped),
        "batch size": order.batch_size,
        "seed": order.seed,
        "shuffle": config.shuffle,
        "last_batch": config.last_batch,
    }


def restore(expected: dict[str, Any], split: OpenSplit, steps: int, state: dict[str, Any]) -> tuple[int, int]:
    """Epoch and position of the next batch.

    Args:
        expected: this run's identity.
        split: what it reads.
        steps: batches of an epoch.
        state: what was saved: an identity, epoch and position.

    Raises:
        DatasetError: it belongs to another run, names what differs; or it is damaged.
    """
    for name, value in expected.items():
        if name == "data set" and state.get(name) != value:  # its name is a hash, which tells nobody anything
            raise DatasetError(
                f"the loader's state was saved with another data set than {split.folder}: "
                "give the one that the run was trained on, or start a new run"
            )
        if state.get(name) != value:
            raise DatasetError(
                f"the loader's state was saved with {name} {state.get(name)!r}, and this run has {value!r}: "
                "continue with the same, or start a new run"
            )
    epoch, position = state.get("epoch"), state.get("position")
    if type(epoch) is not int or type(position) is not int or epoch < 0 or not 0 <= position < steps:
        raise DatasetError(
            f"the loader's state is damaged: epoch {epoch!r}, position {position!r} of {steps} in an epoch"
        )
    return epoch, position
