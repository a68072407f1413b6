"""A DALI pipeline at work: waiting measured, failures turned into one line that names the image."""

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.errors import DatasetError
from pipeline.loader.augmentation import Draws
from pipeline.loader.graph import Decoding, Feed, build_pipeline, reason_of
from pipeline.loader.samples import SampleReader, Samples
from twotower.words import pluralize

_READY_S = 0.001  # handing over a batch that was ready takes 0.05 to 0.3 ms
HELD = 2  # batches whose inputs are kept after their outputs: a GPU may still be copying


@dataclasses.dataclass(frozen=True)
class QueueFill:
    """How full the queue of prepared batches was when the trainer came for the next.

    Attributes:
        batches: batches handed out, the first (which fills the queue) not counted.
        ready: those that were ready, so that the trainer waited less than 1 ms.
        wait_s: seconds waited for the others and for these, together.
        first_s: seconds from opening to the first batch.
    """

    batches: int
    ready: int
    wait_s: float
    first_s: float

    @property
    def ready_share(self) -> float:
        """1: the loader always was ahead; 0: the trainer starved at every step."""
        return self.ready / self.batches if self.batches else 1.0


@dataclasses.dataclass(frozen=True)
class Fed:
    """What DALI has been given for a batch, and what belongs to it and DALI need not know.

    Attributes:
        samples: the rows that this process reads.
        draws: the decisions for these rows; None where nothing is random.
        inputs: of the graph, see :data:`pipeline.loader.graph.Feed`.
    """

    samples: Samples
    draws: Draws | None
    inputs: tuple[Any, ...]


class RunningPipeline:
    """Runs one pipeline over the batches of a process, which are numbered from 0 through all epochs.

    Args:
        decoding: what is decoded.
        graph: makes the outputs out of what feeds it.
        feed: gives a batch; raises StopIteration behind the last.
        number: the first batch.
    """

    def __init__(
        self,
        decoding: Decoding,
        graph: Callable[[Feed], tuple[Any, ...]],
        feed: Callable[[int], Fed],
        *,
        number: int = 0,
    ) -> None:
        self._opened_s = time.perf_counter()
        self._decoding, self._feed, self._first = decoding, feed, number
        self._fed: dict[int, Fed] = {}
        self._pipeline = build_pipeline(decoding, lambda: graph(self._give))
        self._fill = QueueFill(0, 0, 0.0, 0.0)
        self.number = number
        self.started = False

    def _give(self, since_first: int) -> Any:
        """The inputs of a batch, kept as long as DALI may read them: it has no copy."""
        number = self._first + since_first
        self._fed[number] = self._feed(number)
        return self._fed[number].inputs

    def run(self) -> tuple[Fed, Any]:
        """The next batch: what was fed, and the graph's output as a DALI tensor list, valid while it is held.

        Raises:
            DatasetError: an image cannot be decoded, or reading failed.
        """
        if self._pipeline is None:
            raise DatasetError("the loader is closed")
        try:
            self._pipeline.schedule_run()
            begin_s = time.perf_counter()
            (output,) = self._pipeline.outputs(self._stream())
        except RuntimeError as error:
            message = self._explain(reason_of(error))
            self.close()  # DALI's pipeline is lost after any error
            raise DatasetError(message) from error
        self._count(time.perf_counter() - begin_s)
        fed = self._fed[self.number]
        self._fed.pop(self.number - HELD, None)
        self.number += 1
        return fed, output

    def _stream(self) -> Any:
        """torch's stream: outputs are bound to it, so memory that torch gives back waits for torch's kernels."""
        if self._decoding.device_id is None:
            return None
        import torch

        return torch.cuda.current_stream(self._decoding.device_id)

    def _count(self, wait_s: float) -> None:
        fill = self._fill
        if not self.started:
            self.started = True
            self._fill = dataclasses.replace(fill, first_s=time.perf_counter() - self._opened_s)
            return
        ready = fill.ready + (wait_s < _READY_S)
        self._fill = dataclasses.replace(fill, batches=fill.batches + 1, ready=ready, wait_s=fill.wait_s + wait_s)

    @property
    def queue_fill(self) -> QueueFill:
        """The queue's fill so far."""
        return self._fill

    def _explain(self, reason: str) -> str:
        """What to tell the user when DALI failed: which image it was, if it can be found.

        DALI names the sample in some of its errors only. Their bytes are still here, so they are tried one by one:
        those of the batch that was asked for, then of those that DALI has begun beside it.
        """
        split = self._decoding.split
        for number in sorted(number for number in self._fed if number >= self.number):
            samples = self._fed[number].samples
            refused = [row for row, image in enumerate(samples.images) if not _accepts(self._decoding, image)]
            if refused:
                places = sorted({(split.record.shards[samples.tars[row]].name, samples.keys[row]) for row in refused})
                named = "; ".join(f"{shard}: image {key}" for shard, key in places)
                return (
                    f"DALI cannot decode {named} ({reason}): prepare {split.folder} again with --on-error quarantine, "
                    "or name the key in a --skip-list file"
                )
        return f"reading {split.folder} failed: {reason}"

    def close(self) -> None:
        """Stops DALI's threads, frees its buffers, lets go of the inputs; outputs handed out stay valid."""
        self._pipeline = None
        gc.collect()  # DALI's pipelines hold themselves in a circle, and nothing else ends them
        self._fed = {}


def _accepts(decoding: Decoding, image: np.ndarray) -> bool:
    """Whether the decoder takes an image."""
    split = decoding.split
    if split.manifest.image.encoding == "raw":
        return len(image) == split.height_px * split.width_px * split.manifest.image.channels
    from pipeline.preparation.decoder_check import dali_accepts  # loads the codec library, only needed after an error

    return dali_accepts(image.tobytes())


def describe_memory(decoding: Decoding, samples: SampleReader) -> str:
    """What bounds the loader's memory, in words: the tars' index and the batches prepared ahead."""
    split, config = decoding.split, decoding.config
    channels = split.manifest.image.channels
    value_bytes = 4 if decoding.device_id is None else 1  # a GPU's graph ends at uint8 crops
    pixels = channels * (split.height_px * split.width_px + value_bytes * config.crop_px**2)
    ahead_mb = (config.prefetch + 1) * decoding.batch_size * pixels / 1e6
    return (
        f"{split.folder}: {pluralize(split.num_samples, 'sample')} in {pluralize(len(split.tars), 'shard')}, "
        f"{samples.num_open} of them {'mapped' if config.mmap else 'open'} here; about {ahead_mb:,.0f} MB in batches "
        "prepared ahead"
    )
