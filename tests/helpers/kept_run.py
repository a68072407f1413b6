"""A run with untrained but lively weights that keeps the record of a small data set of real photos."""

from pathlib import Path

from tests.helpers.loader_data_set import make_data_set
from tests.helpers.synthetic_run import make_run
from trainer.config import Config, load_config
from trainer.training.kept_data import keep_data_set
from trainer.training.run_folder import DATA_SET_NAME

SMALL = [
    "model.image_px=80",
    "model.channels=[8, 12, 10, 10, 6]",
    "model.hidden=[24, 24]",
    "model.classes=10",
    "model.init_std=[0.02, 0.03, 0.05, 0.05, 0.05, 0.1, 0.2, 0.2]",
    "train.batch_size=4",
]


def small_recipe(*changes: str, channels: int = 3) -> Config:
    """The paper's layers at 80 px."""
    return load_config(None, [*SMALL, f"model.in_channels={channels}", *changes])


def make_kept_run(folder: Path, *changes: str, channels: int = 3, stored_px: int = 96) -> Path:
    """A run folder with a checkpoint of step 3, and what it keeps of its data set; ``folder / "data"`` is that set."""
    data = make_data_set(
        folder / "data", encoding="raw", channels=channels, size=(stored_px, stored_px), train=16, val=4
    )
    run = make_run(folder / "run", small_recipe(*changes, channels=channels), steps=3)
    keep_data_set(data, run / DATA_SET_NAME)
    return run
