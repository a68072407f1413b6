"""The training loop with a clock at every stage: the trainer itself, not a copy of it.

Spans are taken with ``perf_counter``; on a GPU by CUDA events on the stream, resolved only after a slot has ended, so
that measuring never makes the host wait.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.loader.batch import Batch
from pipeline.loader.batches import TrainingLoader
from pipeline.loader.running import QueueFill
from trainer.bench.record import Span
from trainer.config import Config
from trainer.parallel.link import Transfer
from trainer.parallel.mesh import Mesh
from trainer.training.loop import GlobalStatus, Trainer
from trainer.training.metrics import MetricsLog, TrainingProgress

SYNTHETIC_STEPS_AN_EPOCH = 1 << 20
RATE_FACTOR = 1e-3  # on the recipe's learning rate: weights must stay finite on noise for as long as it takes


class Clock:
    """Collects spans: name, begin and end in seconds of this machine's monotonic clock."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._open: list[tuple[str, Any, Any]] = []
        self._anchor: tuple[Any, float] | None = None

    def mark(self) -> Any:
        """A point in time, on the GPU where there is one."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begins a slot."""
        self._open.clear()
        if self._on_gpu:
            torch.cuda.synchronize()
            self._anchor = (self.mark(), time.perf_counter())

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times a piece of work."""
        begin = self.mark()
        yield
        self.add(name, begin)

    def add(self, name: str, begin: Any) -> None:
        """A span from ``begin`` to now."""
        self._open.append((name, begin, self.mark()))

    def stop(self) -> list[tuple[str, float, float]]:
        """Ends a slot: its spans in the order in which they ended."""
        if not self._on_gpu:
            return list(self._open)
        torch.cuda.synchronize()
        assert self._anchor is not None
        anchor, at_s = self._anchor
        return [
            (name, at_s + anchor.elapsed_time(begin) / 1e3, at_s + anchor.elapsed_time(end) / 1e3)
            for name, begin, end in self._open
        ]


def soft_noise(size: int, channels: int, px: int, std: float, generator: torch.Generator) -> Tensor:
    """Grey noise in which a wave's amplitude falls with the square of its frequency, as soft as a photo's shapes.

    White noise would do injustice to the net: on a CPU it takes longer than photos, for the winner of each pooling
    window is then a matter of chance, which no processor can predict.

    Args:
        size: pictures.
        channels: of each, all the same.
        px: edge.
        std: standard deviation over all pixels; the mean is 0.
        generator: of the noise.

    Returns:
        (size, channels, px, px), float32.
    """
    squares = torch.fft.fftfreq(px)[:, None] ** 2 + torch.fft.rfftfreq(px)[None] ** 2
    waves = torch.fft.rfft2(torch.randn((size, 1, px, px), generator=generator)) / squares.clamp(min=1 / px**2)
    waves[:, :, 0, 0] = 0
    pixels = torch.fft.irfft2(waves, s=(px, px))
    return (pixels * (std / pixels.std())).repeat(1, channels, 1, 1)


class SyntheticLoader:
    """One batch that is always ready: soft noise on the recipe's scale, labels, nothing read.

    Args:
        config: the recipe.
        device: ``cpu`` or ``cuda:N``.
        replicas: that share a batch; each gets its part of the rows.
    """

    def __init__(self, config: Config, device: str, replicas: int = 1) -> None:
        model, size = config.model, config.train.batch_size // replicas
        generator = torch.Generator().manual_seed(config.train.seed)
        scale = 60.0 if config.data.scale == "255" else 1.0
        images = soft_noise(size, model.channels, model.image_px, scale, generator)
        labels = torch.randint(model.classes, (size,), generator=generator)
        keys = tuple(f"{number:08d}" for number in range(size))
        draws = np.zeros((size, 3), np.int32)
        self._batch = Batch(images.to(device), labels.to(device), keys, draws, epoch=0, position=0, fingerprint=0)
        self.steps_per_epoch = SYNTHETIC_STEPS_AN_EPOCH
        self.queue_fill = QueueFill(0, 0, 0.0, 0.0)

    def keep(self, batch: Batch) -> None:
        """Give a copy of this batch from now on: what a net's step takes depends on its pictures."""
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
    """The trainer on batches of a loader that can be exchanged, with its stages timed.

    Args:
        config: the recipe.
        data: data set folder, or None for synthetic pictures only.
        run: empty folder for metrics and checkpoints.
        mesh: the pair of processes, or None where this one holds both towers.
        device: ``cpu`` or ``cuda:N``.
        metrics: write metrics as training does.

    Attributes:
        clock: where the spans are.
        sources: the loaders: ``synthetic``, one batch (of the data set where one was given), and ``data``.
    """

    def __init__(
        self,
        config: Config,
        data: Path | None,
        run: Path,
        *,
        mesh: Mesh | None,
        device: str,
        metrics: bool = True,
    ) -> None:
        self.clock = Clock(device)
        self._backward: Any = None
        rate = dataclasses.replace(
            config.optimizer,
            learning_rate=config.optimizer.learning_rate * RATE_FACTOR,
            bias_learning_rate=config.optimizer.bias_learning_rate * RATE_FACTOR,
        )
        self.sources: dict[str, Any] = {
            "synthetic": SyntheticLoader(config, device, mesh.coord.replicas if mesh else 1)
        }
        config = dataclasses.replace(config, optimizer=rate)
        super().__init__(config, data or run, run, mesh=mesh, device=device)
        self.log = MetricsLog(run, 0) if metrics and self.leads else None
        self.progress = TrainingProgress(1, done=0, quiet=True)
        self._time("forward", self.net, "loss", after=self._open_backward)
        self._time("optimizer", self.optimizer, "step")
        self._crossings = ("exchange", "isend", "irecv", "wait") if mesh else ()
        for method in self._crossings:
            self._time_crossing(method)

    def _open_loader(self, state: dict[str, Any] | None) -> TrainingLoader:
        """The data set's loader, if there is one."""
        if self.data == self.run:
            return self.sources["synthetic"]
        loader = self.sources["data"] = super()._open_loader(state)
        self.sources["synthetic"].keep(loader.next())
        return loader

    def _handshake(self) -> None:
        """The bench's own parent started both towers."""

    def _time(self, name: str, owner: Any, method: str, after: Callable[[], None] | None = None) -> None:
        """Puts a span around a method of one object."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._close_backward()
            with self.clock.span(name):
                result = inner(*args, **kwargs)
            if after:
                after()
            return result

        setattr(owner, method, timed)

    def _time_crossing(self, method: str) -> None:
        """Puts a span, named by layer and phase, around one way to begin to cross, or around waiting for its end.

        What a tower computes while a crossing is under way is not in it: only what the crossing holds it up.
        """
        inner = getattr(self.link, method)

        def timed(crossing: str | Transfer, *args: Any) -> Any:
            with self.clock.span(crossing.name if isinstance(crossing, Transfer) else f"{crossing} {args[0]}"):
                return inner(crossing, *args)

        setattr(self.link, method, timed)

    def _open_backward(self) -> None:
        self._backward = self.clock.mark()

    def _close_backward(self) -> None:
        """The backward ends where the next thing begins: another forward, the check, or the update."""
        if self._backward is not None:
            self.clock.add("backward", self._backward)
            self._backward = None

    def _forward_backward(self, batch: Batch) -> float:
        """As the trainer's; the change of layout is a span of its own."""
        with self.clock.span("transfer"):
            images = batch.images.contiguous(memory_format=torch.channels_last)
        return super()._forward_backward(dataclasses.replace(batch, images=images))

    def _agree(self, batch: Batch, loss: float) -> GlobalStatus:
        """As the trainer's."""
        self._close_backward()
        with self.clock.span("check"):
            return super()._agree(batch, loss)

    def run_steps(self, source: str, count: int) -> "Slot":
        """Takes ``count`` steps on batches of one source."""
        loader = self.loader = self.sources[source]
        taken = loader.next

        def timed_next() -> Batch:
            with self.clock.span("wait"):
                return taken()

        loader.next = timed_next
        self.clock.start()
        begin_cpu_s, begin_s = time.process_time(), time.perf_counter()
        for _ in range(count):
            with self.clock.span("step"):
                self._one_step()
        spans = self.clock.stop()
        slot = Slot(count, time.perf_counter() - begin_s, time.process_time() - begin_cpu_s, spans)
        del loader.next  # the class's own again
        return slot

    def save(self) -> float:
        """Seconds of a checkpoint, until it is visible."""
        begin = time.perf_counter()
        self._save()
        self.saver.finish()
        return time.perf_counter() - begin

    def end(self) -> None:
        """Closes what is open, and gives the link its own methods back."""
        for method in self._crossings:
            delattr(self.link, method)
        for loader in self.sources.values():
            loader.close()
        if self.log:
            self.log.close()


@dataclasses.dataclass(frozen=True)
class Slot:
    """Some steps in a row.

    Attributes:
        count: steps.
        wall_s: of all of them.
        cpu_s: processor time of this process, all threads.
        spans: (name, begin s, end s), in the order in which they ended; a step ends with ``step``.
    """

    count: int
    wall_s: float
    cpu_s: float
    spans: list[tuple[str, float, float]]

    def by_step(self) -> list[dict[str, float]]:
        """Seconds of each stage in each step; ``exchange`` is the sum of the crossings, ``rest`` what no span covers.

        Forward and backward are given without the crossings inside them.
        """
        steps: list[dict[str, float]] = []
        current: dict[str, float] = {}
        for name, begin, end in self.spans:
            if name != "step":
                current[name] = current.get(name, 0.0) + end - begin
                continue
            crossings = {key: value for key, value in current.items() if " " in key}
            for phase in ("forward", "backward"):
                inside = sum(value for key, value in crossings.items() if key.endswith(f" {phase}"))
                current[phase] = current.get(phase, 0.0) - inside
            known = sum(value for key, value in current.items() if key not in crossings)
            current["exchange"] = sum(crossings.values())
            current["rest"] = end - begin - known - current["exchange"]
            current["step"] = end - begin
            steps.append(current)
            current = {}
        return steps


def steps_of(slots: Sequence[Slot]) -> list[list[tuple[str, float, float]]]:
    """The spans of every step, in order; the last of each is the whole ``step``."""
    steps: list[list[tuple[str, float, float]]] = [[]]
    for span in (span for slot in slots for span in slot.spans):
        steps[-1].append(span)
        if span[0] == "step":
            steps.append([])
    return steps[:-1]


def middle_step(slots: Sequence[Slot]) -> int:
    """Number of the step whose length is the median."""
    lengths = [spans[-1][2] - spans[-1][1] for spans in steps_of(slots)]
    return lengths.index(statistics.median_low(lengths))


def timeline(slots: Sequence[Slot], step: int, tower: str) -> list[Span]:
    """One step's spans, in milliseconds of this machine's clock."""
    return [Span(tower, name, begin * 1e3, end * 1e3) for name, begin, end in steps_of(slots)[step]]
