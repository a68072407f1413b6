"""Small runs of which a test says how late the host reads, and whether steps are graphs."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.loader.batch import Batch
from pipeline.loader.running import QueueFill
from tests.helpers.training_commands import CONFIG
from trainer.config import Config, load_config
from trainer.errors import DivergedError
from trainer.parallel.mesh import Mesh
from trainer.training.loop import Trainer
from trainer.training.metrics import TrainingProgress

KEYS = ("kind", "step", "epoch", "loss", "learning_rate", "gradient_norm", "top1")
SMALL = (
    "model.channels=[4, 4, 4, 4, 4]",
    "model.hidden=[16, 16]",
    "train.epochs=2",
    "train.batch_size=4",  # of 24 images
    "train.evaluate_every_epochs=0",
    "train.checkpoint_every_steps=5",
    "train.keep_checkpoints=9",
    "train.threads=1",
    "train.loggers=[]",
    "model.dropout=0.5",
    "optimizer.learning_rate=0.01",
    "optimizer.milestones=[1]",
)
RECIPES = {
    "usual": (),
    "partial": (
        "train.batch_size=10",
        "data.last_batch=partial",
        "optimizer.warmup_epochs=1.5",
        "train.epochs=5",
        'model.post_ops=[["relu", "batch_norm", "maxpool"], ["relu", "lrn", "maxpool"], [], [], ["relu", "maxpool"]]',
    ),
    "plateau": (
        "optimizer.milestones=[]",
        "optimizer.schedule=plateau",
        "optimizer.patience=1",
        "optimizer.threshold=0.95",  # the second evaluation is a plateau, whatever it finds
        "train.batch_size=8",
        "train.epochs=3",
        "train.evaluate_every_epochs=1",
    ),
}


def recipe(name: str, *changes: str) -> Config:
    """One of ``RECIPES``, for the tiny data set."""
    gray = ("model.classes=10", "model.in_channels=1")
    return load_config(CONFIG, [*SMALL, *gray, *RECIPES[name], *changes])


def make_trainer(name: str | Config, data: Path, run: Path, *, mesh: Mesh | None = None, **how: Any) -> Trainer:
    """A trainer in this process."""
    config = recipe(name) if isinstance(name, str) else name
    return Trainer(config, data, run, mesh=mesh, **how)


def trained(name: str | Config, data: Path, run: Path, **how: Any) -> Path:
    """The folder of a run that was trained to its end."""
    assert make_trainer(name, data, run, **how).train().exit_reason == "finished"
    return run


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    files = sorted(folder.glob("tower-*.safetensors"))
    return {f"{path.stem}.{name}": tensor for path in files for name, tensor in load_file(path).items()}


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of weights, statistics and velocities."""
    named: Mapping[str, Tensor] = trainer.net.state_dict()
    velocities = {f"velocity/{name}": trainer.optimizer.velocity(p) for name, p in trainer.net.named_parameters()}
    return {name: tensor.clone() for name, tensor in (*named.items(), *velocities.items())}


def spoil(trainer: Trainer, step: int, *, images: bool = True) -> tuple[list[tuple[str, ...]], dict[str, Tensor]]:
    """The images of a step are no numbers (here); the keys of all batches, and the state before that step."""
    seen: list[tuple[str, ...]] = []
    before: dict[str, Tensor] = {}
    next_batch = trainer.loader.next

    def next_one() -> Any:
        batch = next_batch()
        seen.append(batch.keys)
        if trainer.step != step:
            return batch
        before.update(state_of(trainer))
        if not images:
            return batch
        return dataclasses.replace(batch, images=torch.full_like(batch.images, torch.nan))

    trainer.loader.next = next_one  # type: ignore[method-assign]
    return seen, before


def lag_facts(mesh: Mesh, data: str, folder: str) -> dict[str, Any]:
    """What one process of several finds with a host that reads late, beside one that waits; see the test."""
    places = {name: Path(folder) / name for name in ("waits", "lags", "uninterrupted", "stopped", "spoiled")}
    for place in places.values():
        place.mkdir(exist_ok=True)  # the same for all processes

    def train(name: str, place: str, **how: Any) -> Trainer:
        trainer = make_trainer(name, Path(data), places[place], mesh=mesh, **how)
        assert trainer.train().exit_reason == "finished"
        return trainer

    facts: dict[str, Any] = {
        place: state_of(train("plateau", place, lag=lag)) for lag, place in enumerate(("waits", "lags"))
    }
    facts["uninterrupted"] = state_of(train("usual", "uninterrupted", lag=0))
    stopped = make_trainer("usual", Path(data), places["stopped"], mesh=mesh, lag=1)
    if mesh.coord.rank == mesh.coord.world - 1:
        at_step(stopped, 1, lambda: setattr(stopped.stop, "name", "SIGTERM"))
    facts["stopped at"] = stopped.train().step
    facts["resumed"] = state_of(train("usual", "stopped", lag=1))
    spoiled = make_trainer("usual", Path(data), places["spoiled"], mesh=mesh, lag=1)
    facts["seen"], facts["before"] = spoil(spoiled, 3, images=mesh.coord.rank == mesh.coord.world - 1)
    try:
        spoiled.train()
    except DivergedError as error:
        facts["diverged"], facts["after"] = str(error), state_of(spoiled)
    return facts


def at_step(trainer: Trainer, step: int, act: Callable[[], Any]) -> None:
    """Does something while a step waits for its batch."""
    next_batch = trainer.loader.next

    def next_one() -> Any:
        if trainer.step == step:
            act()
        return next_batch()

    trainer.loader.next = next_one  # type: ignore[method-assign]


class NoiseLoader:
    """Other noise for every step, on a device; no data set."""

    steps_per_epoch = 4
    queue_fill = QueueFill(0, 0, 0.0, 0.0)

    def __init__(self, config: Config, device: str) -> None:
        self._shape = (config.train.batch_size, config.model.in_channels, config.model.image_px, config.model.image_px)
        self._classes, self._device, self._count = config.model.classes, device, 0

    def next(self) -> Batch:
        generator = torch.Generator().manual_seed(self._count)
        images = torch.randn(self._shape, generator=generator)
        labels = torch.randint(self._classes, self._shape[:1], generator=generator)
        keys, number = tuple(f"{self._count}-{row}" for row in range(len(labels))), self._count
        self._count += 1
        on_device = (tensor.pin_memory() if self._device != "cpu" else tensor for tensor in (images, labels))
        images, labels = (tensor.to(self._device, non_blocking=True) for tensor in on_device)
        draws = np.zeros((len(keys), 3), np.int32)
        return Batch(images, labels, keys, draws, epoch=0, position=number, fingerprint=number)

    def close(self) -> None:
        """Nothing to close."""


class NoiseTrainer(Trainer):
    """A trainer on noise that writes nothing; its steps are made one by one."""

    def __init__(self, config: Config, run: Path, *, device: str, **how: Any) -> None:
        super().__init__(config, run, run, device=device, **how)
        self.progress = TrainingProgress(1, done=0, quiet=True)

    def _open_loader(self, state: dict[str, Any] | None) -> Any:
        return NoiseLoader(self.config, self.device)

    def _check_consistency(self) -> None:
        """It is alone."""

    def make_steps(self, count: int) -> None:
        """Launches steps, and reads what became of them."""
        for _ in range(count):
            self._one_step()
        self._settle()
