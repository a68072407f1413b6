"""A DALI pipeline at work: waiting measured, failures turned into one line that names the image."""

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import DatasetError
from pipeline.loader.batch import read_keys, read_shards
from pipeline.loader.graph import Reader, build_pipeline, encoded_graph, reason_of
from pipeline.loader.state import graft, strip
from twotower.words import pluralize

_READY_S = 0.001  # handing over a batch that was ready takes 0.05 to 0.3 ms


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


class RunningPipeline:
    """Runs one pipeline; counts iterations from ``iteration``.

    Args:
        reader: what is read.
        graph: function that makes the outputs.
        checkpoint: of :meth:`checkpoint` after ``iteration`` iterations, to continue there; of any of our pipelines
            with the same reader, whatever its device and recipe.
        iteration: see above.
        checkpointing: whether :meth:`checkpoint` is wanted.
    """

    def __init__(
        self,
        reader: Reader,
        graph: Callable[[], tuple[Any, ...]],
        *,
        checkpointing: bool = False,
        checkpoint: bytes | None = None,
        iteration: int = 0,
    ) -> None:
        self._opened_s = time.perf_counter()
        self._reader = reader
        if checkpoint is not None:
            fresh = build_pipeline(reader, graph, checkpointing=True)
            checkpoint = graft(bytes(fresh.checkpoint()), checkpoint)
            del fresh
        self._pipeline = build_pipeline(reader, graph, checkpointing=checkpointing, checkpoint=checkpoint)
        self._fill = QueueFill(0, 0, 0.0, 0.0)
        self.iteration = iteration
        self.started = False

    def run(self) -> Any:
        """The outputs of the next iteration, as DALI tensor lists that stay valid while they are held.

        Raises:
            DatasetError: an image cannot be decoded, or reading failed.
        """
        if self._pipeline is None:
            raise DatasetError("the loader is closed")
        try:
            self._pipeline.schedule_run()
            begin_s = time.perf_counter()
            outputs = self._pipeline.outputs(self._stream())
        except RuntimeError as error:
            self.close()  # DALI's pipeline is lost after any error
            raise DatasetError(explain(self._reader, self.iteration, reason_of(error))) from error
        self._count(time.perf_counter() - begin_s)
        self.iteration += 1
        return outputs

    def _stream(self) -> Any:
        """torch's stream: outputs are bound to it, so memory that torch gives back waits for torch's kernels."""
        if self._reader.device_id is None:
            return None
        import torch

        return torch.cuda.current_stream(self._reader.device_id)

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

    def checkpoint(self) -> bytes:
        """The reader's state after the last iteration that :meth:`run` returned, whatever has been prefetched since."""
        return strip(bytes(self._pipeline.checkpoint()))

    def close(self) -> None:
        """Stops DALI's threads, frees its buffers, closes its files; outputs handed out stay valid."""
        self._pipeline = None
        gc.collect()  # DALI's pipelines hold themselves in a circle, and nothing else ends them


def explain(reader: Reader, iteration: int, reason: str) -> str:
    """What to tell the user when iteration ``iteration`` failed: which image it was, if it can be found."""
    folder = reader.split.folder
    refused = find_refused(reader, iteration)
    if not refused:
        return f"reading {folder} failed: {reason}"
    named = "; ".join(f"{shard}: image {key}" for shard, key in refused)
    return (
        f"DALI cannot decode {named} ({reason}): prepare {folder} again with --on-error quarantine, "
        "or name the key in a --skip-list file"
    )


def find_refused(reader: Reader, iteration: int) -> list[tuple[str, str]]:
    """Shard and key of every image of an iteration that the decoder refuses.

    DALI names the sample in some of its errors only. Reading without decoding repeats the order at over 100,000
    samples per second, so the batch is read again and its images are tried one by one.
    """
    quiet = dataclasses.replace(reader, config=dataclasses.replace(reader.config, prefetch=1, threads=1))
    pipeline = build_pipeline(quiet, lambda: encoded_graph(quiet))
    try:
        for _ in range(iteration):
            pipeline.run()
        encoded, source = pipeline.run()
    except RuntimeError:
        return []
    samples = zip(read_shards(source, reader.split.folder), read_keys(source), strict=True)
    refused = [sample for i, sample in enumerate(samples) if not _accepts(reader, encoded.at(i).tobytes())]
    return sorted(set(refused))


def _accepts(reader: Reader, data: bytes) -> bool:
    image = reader.split.manifest.image
    if image.encoding == "raw":
        return len(data) == reader.split.height_px * reader.split.width_px * image.channels
    from pipeline.preparation.decoder_check import dali_accepts  # loads the codec library, only needed after an error

    return dali_accepts(data)


def describe_memory(reader: Reader) -> str:
    """What bounds the loader's memory, in words: the shuffle buffer and the batches prepared ahead."""
    split, config = reader.split, reader.config
    buffer = min(config.shuffle_buffer, split.num_samples) if reader.shuffle else 0
    buffer_mb = buffer * split.sample_bytes / 1e6
    channels = split.manifest.image.channels
    pixels = channels * (split.height_px * split.width_px + 4 * config.crop_px**2)
    ahead_mb = (config.prefetch + 1) * reader.batch_size * pixels / 1e6
    return (
        f"{split.folder}: {pluralize(split.num_samples, 'sample')} in {pluralize(len(split.tars), 'shard')}; at "
        f"most {buffer_mb:,.0f} MB in the "
        f"shuffle buffer{' (mapped)' if config.mmap else ''} and about {ahead_mb:,.0f} MB in batches prepared ahead"
    )
