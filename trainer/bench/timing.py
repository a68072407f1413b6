"""The training loop with a clock at every phase: the trainer itself, not a copy of it.

The trainer, its step and the link open ``timed(NAME)`` around what they do; here that is :meth:`Clock.span`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.loader.batch import Batch
from pipeline.loader.batches import TrainingLoader
from pipeline.loader.running import QueueFill
from trainer.config import Config
from trainer.parallel.mesh import Mesh
from trainer.precision import image_dtype
from trainer.training.loop import Trainer
from trainer.training.metrics import MetricsLog, TrainingProgress

RATE_FACTOR = 1e-3  # on the recipe's learning rate: weights must stay finite on noise for as long as it takes
Spans = list[tuple[str, float, float]]  # name, begin and end in seconds of this machine's monotonic clock


class Clock:
    """Collects spans: by ``perf_counter``, on a GPU by CUDA events on the stream.

    Events are resolved only after an interval has ended, so that measuring never makes the host wait.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._marks: list[tuple[str, Any, Any]] = []
        self._anchor: tuple[Any, float] | None = None

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times a piece of work."""
        begin = self._mark()
        yield
        self._marks.append((name, begin, self._mark()))

    def start(self) -> None:
        """Begins an interval."""
        self._marks.clear()
        if self._on_gpu:
            torch.cuda.synchronize()
            self._anchor = (self._mark(), time.perf_counter())

    def stop(self) -> Spans:
        """Ends an interval: its spans in the order in which they ended."""
        if not self._on_gpu:
            return list(self._marks)
        torch.cuda.synchronize()
        assert self._anchor is not None
        anchor, at_s = self._anchor

        def seconds(event: Any) -> float:
            return at_s + anchor.elapsed_time(event) / 1e3

        return [(name, seconds(begin), seconds(end)) for name, begin, end in self._marks]


@dataclasses.dataclass(frozen=True)
class Interval:
    """Some batches or steps in a row."""

    count: int
    wall_s: float  # of all of them
    cpu_s: float  # processor time of this process, all threads
    own_s: float  # of the measuring thread alone
    spans: Spans  # of steps, in the order in which they ended; a step ends with "step"


def steps_of(intervals: Sequence[Interval]) -> list[Spans]:
    """The spans of every step, in order; the last of each is the whole ``step``."""
    steps: list[Spans] = [[]]
    for span in (span for interval in intervals for span in interval.spans):
        steps[-1].append(span)
        if span[0] == "step":
            steps.append([])
    return steps[:-1]


def seconds_by_stage(step: Spans) -> dict[str, float]:
    """Seconds of each stage in a step; crossings (``conv3 forward``) besides.

    Forward and backward are given without the crossings inside them; ``exchange`` is the sum of the crossings, ``rest``
    what no span covers.
    """
    found: dict[str, float] = {}
    for name, begin, end in step:
        found[name] = found.get(name, 0.0) + end - begin
    crossings = {name: seconds for name, seconds in found.items() if " " in name}
    for name, seconds in crossings.items():
        found[name.split(" ")[1]] -= seconds
    found["exchange"] = sum(crossings.values())
    known = sum(seconds for name, seconds in found.items() if name not in crossings and name != "step")
    found["rest"] = found["step"] - known
    return found


def soft_noise(size: int, channels: int, px: int, std: float, generator: torch.Generator) -> Tensor:
    """Gray noise in which a wave's amplitude falls with the square of its frequency, as soft as a photo's shapes.

    White noise would do injustice to the net: on a CPU it takes longer than photos, for the winner of each pooling
    window is then a matter of chance, which no processor can predict.

    Returns:
        (size, channels, px, px), float32, mean 0, standard deviation ``std``; all channels are the same.
    """
    squares = torch.fft.fftfreq(px)[:, None] ** 2 + torch.fft.rfftfreq(px)[None] ** 2
    waves = torch.fft.rfft2(torch.randn((size, 1, px, px), generator=generator)) / squares.clamp(min=1 / px**2)
    waves[:, :, 0, 0] = 0
    pixels = torch.fft.irfft2(waves, s=(px, px))
    return (pixels * (std / pixels.std())).repeat(1, channels, 1, 1)


class SyntheticLoader:
    """One batch that is always ready: soft noise on the recipe's scale and labels; each replica gets its part of it."""

    steps_per_epoch = 1 << 20
    shares_decoding = False
    queue_fill = QueueFill(0, 0, 0.0, 0.0)

    def __init__(self, config: Config, device: str, replicas: int) -> None:
        model, size = config.model, config.train.batch_size // replicas
        generator = torch.Generator().manual_seed(config.train.seed)
        std = 60.0 if config.data.normalize == "none" else 1.0
        images = soft_noise(size, model.in_channels, model.image_px, std, generator)
        labels = torch.randint(model.classes, (size,), generator=generator)
        keys, draws = tuple(f"{number:08d}" for number in range(size)), np.zeros((size, 3), np.int32)
        images = images.to(device, image_dtype(config.train.precision, device))
        if images.is_cuda:  # as the loader makes them
            images = images.contiguous(memory_format=torch.channels_last)
        self._batch = Batch(images, labels.to(device), keys, draws, epoch=0, position=0, fingerprint=0)

    def keep(self, batch: Batch) -> None:
        """Gives a copy of this batch from now on: what a net's step takes depends on its images."""
        self._batch = dataclasses.replace(batch, images=batch.images.clone(), labels=batch.labels.clone())

    def next(self) -> Batch:
        """The batch."""
        return self._batch

    def state(self) -> dict[str, Any]:
        """Nothing to go on from."""
        return {}

    def close(self) -> None:
        """Nothing to close."""


class TimedTrainer(Trainer):
    """The trainer on batches of a loader that can be exchanged, with its phases timed.

    Args:
        config: the recipe.
        data: data set folder, or None for synthetic images only.
        run: empty folder for metrics and checkpoints.
        mesh: the pair of processes, or None where this one holds both towers.
        device: ``cpu`` or ``cuda:N``.
        metrics: write metrics as training does.

    Attributes:
        sources: the loaders: ``synthetic``, one batch (of the data set where one was given), and ``data``.
    """

    def __init__(
        self, config: Config, data: Path | None, run: Path, *, mesh: Mesh | None, device: str, metrics: bool = True
    ) -> None:
        self.clock = Clock(device)
        replicas = mesh.coord.replicas if mesh else 1
        self.sources: dict[str, Any] = {"synthetic": SyntheticLoader(config, device, replicas)}
        rates = {f: getattr(config.optimizer, f) * RATE_FACTOR for f in ("learning_rate", "bias_learning_rate")}
        train = dataclasses.replace(config.train, loggers=("tensorboard",))  # nothing of a benchmark is sent anywhere
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **rates), train=train)
        super().__init__(config, data or run, run, mesh=mesh, device=device, timed=self.clock.span)
        if self.link:
            self.link.timed = self.clock.span
        self.log = MetricsLog(run, config, 0) if metrics and self.leads else None
        self.progress = TrainingProgress(1, done=0, quiet=True)

    def _open_loader(self, state: dict[str, Any] | None) -> TrainingLoader:
        """The data set's loader, if there is one."""
        if self.data == self.run:
            return self.sources["synthetic"]
        loader = self.sources["data"] = super()._open_loader(state)
        self.sources["synthetic"].keep(loader.next())
        return loader

    def _check_consistency(self) -> None:
        """The bench's own parent started both towers."""

    def run_steps(self, source: str, count: int) -> Spans:
        """Takes ``count`` steps on batches of one source."""
        self.loader = self.sources[source]
        self.clock.start()
        for _ in range(count):
            with self.clock.span("step"):
                self._one_step()
        return self.clock.stop()

    def save(self) -> float:
        """Seconds of a checkpoint, until it is visible."""
        begin = time.perf_counter()
        self._save()
        self.saver.finish()
        return time.perf_counter() - begin

    def end(self) -> None:
        """Closes what is open; the link, which the next trainer takes over, is timed no more."""
        if self.link:
            self.link.timed = contextlib.nullcontext
        for loader in self.sources.values():
            loader.close()
        if self.log:
            self.log.close("finished")
