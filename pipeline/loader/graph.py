"""The pipeline as DALI operators: reader, decoder, then crop, mirror, mean, color and scale in one. Only here is DALI.

One graph for CPU and GPU: the device is a parameter. DALI is imported when a pipeline is built, so everything that only
describes a loader works where DALI is not installed.
"""

import dataclasses
import logging
import math
import os
import time
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, DatasetError
from pipeline.loader.augmentation import reader_seed
from pipeline.loader.config import LoaderConfig
from pipeline.loader.open_split import OpenSplit

DECODER_SHARES = (0.0, 0.25, 0.5, 0.65, 0.75, 0.85, 1.0)  # of a batch's JPEGs for the GPU's hardware decoder
_DEFAULT_SHARE = 0.65  # DALI's own
_WARM_UP, _BATCHES = 4, 12
_LOGGER = logging.getLogger(__name__)


def _dali() -> Any:
    """DALI's operators and types; typed Any because DALI makes them at import time."""
    import nvidia.dali

    return nvidia.dali


@dataclasses.dataclass(frozen=True)
class Reader:
    """What DALI reads, and how.

    Attributes:
        split: the samples.
        config: the recipe.
        batch_size: samples per batch.
        device: ``cpu`` or ``cuda:N``.
        seed: of the order.
        shuffle: whether every epoch has another order; else the stored one.
    """

    split: OpenSplit
    config: LoaderConfig
    batch_size: int
    device: str
    seed: int
    shuffle: bool

    @property
    def device_id(self) -> int | None:
        """The CUDA device's number, None on the CPU."""
        kind, _, number = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
            raise ConfigError(f"device is {self.device!r}: the loader knows cpu and cuda:N")
        return None if kind == "cpu" else int(number or 0)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that DALI makes of one epoch, the last one padded."""
        return math.ceil(self.split.num_samples / self.batch_size)


def read_encoded(reader: Reader) -> tuple[Any, Any, Any]:
    """The reader: encoded images, label text (padded), source of each sample (padded)."""
    fn, seed = _dali().fn, reader_seed(reader.seed)
    shuffling = {
        "random_shuffle": True,
        "initial_fill": reader.config.shuffle_buffer,
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": seed,
    }
    encoded, labels = fn.readers.webdataset(
        paths=list(reader.split.tars),
        index_paths=list(reader.split.indexes),
        ext=[reader.split.manifest.image.extension, "cls"],
        missing_component_behavior="error",  # the default makes empty tensors, silently
        name="Reader",
        pad_last_batch=True,
        dont_use_mmap=not reader.config.mmap,
        tensor_init_bytes=1,  # grows as needed; the default of 1 MiB reserves 4 GiB for a shuffle buffer of 4,096
        seed=seed,
        **(shuffling if reader.shuffle else {}),
    )
    return encoded, fn.pad(labels), fn.pad(fn.get_property(encoded, key="source_info"))


def decode(reader: Reader, encoded: Any, roi: dict[str, Any] | None = None) -> Any:
    """The decoder: uint8 HWC pixels, on the reader's device; cropped to ``roi`` if given (CPU)."""
    fn, types = _dali().fn, _dali().types
    image = reader.split.manifest.image
    on_gpu = reader.device_id is not None
    if image.encoding == "raw":
        shape = [reader.split.height_px, reader.split.width_px, image.channels]
        return fn.reshape(encoded.gpu() if on_gpu else encoded, shape=shape, layout="HWC")
    options: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.GRAY if image.channels == 1 else types.RGB,
        "adjust_orientation": image.encoding == "original",  # prepare has applied it to everything it encoded
    }
    if on_gpu:
        options["jpeg_fancy_upsampling"] = True  # the CPU decoder's chroma, so that both give the same pixels
        options["hw_decoder_load"] = reader.config.hw_decoder_load
    if roi is None:
        return fn.decoders.image(encoded, **options)
    return fn.decoders.image_crop(encoded, **options, **roi)


def encoded_graph(reader: Reader) -> tuple[Any, ...]:
    """Reads only: encoded images, source text."""
    encoded, _, source = read_encoded(reader)
    return encoded, source


def decoded_graph(reader: Reader) -> tuple[Any, ...]:
    """Reads and decodes whole images."""
    return (decode(reader, read_encoded(reader)[0]),)


def define_pipeline(reader: Reader, graph: Any, *, checkpointing: bool = False, checkpoint: bytes | None = None) -> Any:
    """Defines a DALI pipeline out of ``graph``, a function that returns its outputs; needs no GPU yet."""
    definition = _dali().pipeline_def(
        graph,
        batch_size=reader.batch_size,
        num_threads=reader.config.threads or len(os.sched_getaffinity(0)),
        device_id=reader.device_id,
        seed=reader_seed(reader.seed),
        prefetch_queue_depth=reader.config.prefetch,
        enable_checkpointing=checkpointing,
        checkpoint=checkpoint,
    )
    return definition()


def build_pipeline(reader: Reader, graph: Any, *, checkpointing: bool = False, checkpoint: bytes | None = None) -> Any:
    """Defines and builds a pipeline.

    Raises:
        ConfigError: there is no such device.
        DatasetError: DALI cannot open the data set.
    """
    if reader.device_id is not None:
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if reader.device_id >= found:
            raise ConfigError(
                f"device is {reader.device!r}: this machine has {found} CUDA devices; use cpu or an existing one"
            )
    try:
        pipeline = define_pipeline(reader, graph, checkpointing=checkpointing, checkpoint=checkpoint)
        pipeline.build()
    except RuntimeError as error:
        raise DatasetError(f"DALI cannot open {reader.split.folder}: {reason_of(error)}") from error
    return pipeline


def reason_of(error: BaseException) -> str:
    """What happened, out of DALI's long message: the line after ``encountered:``, or the last that says something."""
    text = str(error).split("C++ context:")[0]
    lines = [line.strip() for line in text.rsplit("encountered:", 1)[-1].splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Current pipeline object", "Critical error"))]
    return (lines[0] if "encountered:" in text else lines[-1]) if lines else type(error).__name__


def training_graph(reader: Reader, feed: Any, *, part: int = 0, parts: int = 1) -> tuple[Any, ...]:
    """Outputs images, label text, source text, geometry, color shift; of the images one part of ``parts`` only.

    The images are float32 CHW, cropped, mirrored, their mean subtracted and divided, all in one pass. What is still to
    be done is :meth:`pipeline.loader.normalize.Normalizer.finish`.

    Args:
        reader: what to read.
        feed: callback of DALI's external source: BatchInfo to geometry (N, 3) int32, x and y (N,) float32, mirror (N,)
            int32, shift, and what to subtract and to divide by, (N, C) float32 each.
        part, parts: rows to decode: an equal part of the batch, see :class:`pipeline.loader.batch.BatchShare`.
    """
    encoded, labels, source = read_encoded(reader)
    geometry, x, y, mirror, shift, mean, std = _draws(feed, 7)
    encoded, x, y, mirror, mean, std = _part_of(reader, (encoded, x, y, mirror, mean, std), part, parts)
    pixels, window = _decode_crops(reader, encoded, x, y)
    images = _dali().fn.crop_mirror_normalize(pixels, mirror=mirror, mean=mean, std=std, output_layout="CHW", **window)
    return images, labels, source, geometry, shift


def split_graph(reader: Reader, feed: Any, *, part: int, parts: int) -> tuple[Any, ...]:
    """As :func:`training_graph`, but decodes one part of each batch only, to uint8 CHW crops, mirrored.

    Labels, sources and draws are those of the whole batch.
    """
    fn, types = _dali().fn, _dali().types
    encoded, labels, source = read_encoded(reader)
    geometry, x, y, mirror, shift = _draws(lambda info: feed(info)[:5], 5)
    encoded, x, y, mirror = _part_of(reader, (encoded, x, y, mirror), part, parts)
    pixels, window = _decode_crops(reader, encoded, x, y)
    crops = fn.crop_mirror_normalize(pixels, mirror=mirror, dtype=types.UINT8, output_layout="CHW", **window)
    return crops, labels, source, geometry, shift


def cropped_graph(reader: Reader, feed: Any) -> tuple[Any, ...]:
    """Reads and decodes as :func:`training_graph` does, and stops there: uint8 pixels; of raw images the crops."""
    encoded = read_encoded(reader)[0]
    x, y = _draws(lambda info: feed(info)[1:3], 2)
    pixels, window = _decode_crops(reader, encoded, x, y)
    if reader.split.manifest.image.encoding == "raw":
        pixels = _dali().fn.crop(pixels, **window)
    return (pixels,)


def evaluation_graph(reader: Reader, views: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[Any, ...]:
    """Outputs images, (V, C, S, S) a sample or (C, S, S) for a single view, label text, source text.

    Args:
        reader: what to read.
        views: (V, 3) crop x, crop y, mirror.
        mean, std: (C,), what is subtracted and divided by.
    """
    fn = _dali().fn
    encoded, labels, source = read_encoded(reader)
    pixels = decode(reader, encoded)
    images = [
        fn.crop_mirror_normalize(
            pixels,
            mirror=int(mirror),
            mean=mean.tolist(),
            std=std.tolist(),
            output_layout="CHW",
            **_window(reader, float(x), float(y)),
        )
        for x, y, mirror in zip(*positions(views, reader), views[:, 2], strict=True)
    ]
    return images[0] if len(images) == 1 else fn.stack(*images), labels, source


def positions(geometry: np.ndarray, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """Crop offsets as DALI wants them: shares of their range, float32; its rounding gives the offset back exactly."""
    x = geometry[:, 0] / max(1, reader.split.width_px - reader.config.crop_px)
    y = geometry[:, 1] / max(1, reader.split.height_px - reader.config.crop_px)
    return x.astype(np.float32), y.astype(np.float32)


def _draws(feed: Any, count: int) -> Any:
    return _dali().fn.external_source(source=feed, batch=True, batch_info=True, num_outputs=count)


def _part_of(reader: Reader, nodes: tuple[Any, ...], part: int, parts: int) -> tuple[Any, ...]:
    """One part of a batch. ``_conditional.split`` is what DALI's own ``if`` compiles to; used directly it gives a
    smaller batch instead of one merged again. DALI has no public operator that takes rows of a batch."""
    if parts == 1:
        return nodes
    fn = _dali().fn
    mine = np.arange(reader.batch_size) * parts // reader.batch_size == part
    predicate = fn.external_source(source=lambda _: list(mine), batch=True, batch_info=True)
    return tuple(fn._conditional.split(node, predicate=predicate)[0] for node in nodes)


def _window(reader: Reader, x: Any, y: Any) -> dict[str, Any]:
    return {"crop": (reader.config.crop_px,) * 2, "crop_pos_x": x, "crop_pos_y": y}


def _decode_crops(reader: Reader, encoded: Any, x: Any, y: Any) -> tuple[Any, dict[str, Any]]:
    """Pixels, and the window that is still to be cut out of them.

    On a CPU the decoder can stop at the crop's edge: 7 % faster, and the same pixels (tested).
    """
    window = _window(reader, x, y)
    if reader.device_id is None and reader.split.manifest.image.encoding in ("jpeg", "png"):
        return decode(reader, encoded, window), {}
    return decode(reader, encoded), window


def measure_decoder_shares(reader: Reader) -> dict[float, float]:
    """Images a second of reading and decoding for each of :data:`DECODER_SHARES`; takes some seconds."""
    return {share: _measure_share(reader, share) for share in DECODER_SHARES}


def _measure_share(reader: Reader, share: float) -> float:
    config = dataclasses.replace(reader.config, hw_decoder_load=share)
    trial = dataclasses.replace(reader, config=config, shuffle=False)
    pipeline = build_pipeline(trial, lambda: decoded_graph(trial))
    for _ in range(_WARM_UP):
        pipeline.run()
    begin_s = time.perf_counter()
    for _ in range(_BATCHES):
        pipeline.run()
    return _BATCHES * reader.batch_size / (time.perf_counter() - begin_s)


def with_decoder_share(reader: Reader) -> Reader:
    """The reader with ``hw_decoder_load`` decided: measured where the config says -1 and a GPU decodes JPEGs."""
    if reader.config.hw_decoder_load >= 0:
        return reader
    share = _DEFAULT_SHARE
    if reader.device_id is not None and reader.split.manifest.image.encoding in ("jpeg", "original"):
        rates = measure_decoder_shares(reader)
        share = max(rates, key=lambda candidate: rates[candidate])
        _LOGGER.info("hw_decoder_load %.2f chosen out of %s images/s", share, {k: round(v) for k, v in rates.items()})
    return dataclasses.replace(reader, config=dataclasses.replace(reader.config, hw_decoder_load=share))
