"""The pipeline as DALI operators: reader, decoder, crop, mirror, mean, colour, scale. Nothing else imports DALI.

One graph for CPU and GPU: the device is a parameter. DALI is imported when a pipeline is built, so everything that only
describes a loader works where DALI is not installed.
"""

import dataclasses
import math
import os
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, DatasetError
from pipeline.loader.augmentation import Statistics, centre_geometry, reader_seed, ten_views
from pipeline.loader.config import LoaderConfig
from pipeline.loader.open_split import OpenSplit

STANDARDISE_EPSILON = 1e-3  # grey levels squared, added to the variance: a flat picture becomes 0, not a division by 0


def _dali() -> Any:
    """DALI's operators and types; typed Any because DALI makes them at import time."""
    import nvidia.dali

    return nvidia.dali


@dataclasses.dataclass(frozen=True)
class Reader:
    """Arguments of DALI's reader and of the pipeline around it."""

    split: OpenSplit
    config: LoaderConfig
    batch_size: int
    device: str
    seed: int
    shuffle: bool
    replica: int = 0
    replicas: int = 1

    @property
    def device_id(self) -> int | None:
        """The CUDA device's number, None on the CPU."""
        kind, _, number = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
            raise ConfigError(f"device is {self.device!r}: the loader knows cpu and cuda:N")
        return None if kind == "cpu" else int(number or 0)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that DALI makes of one epoch: the largest replica's share, its last batch padded."""
        return math.ceil(math.ceil(self.split.num_samples / self.replicas) / self.batch_size)


class Normaliser:
    """Crop, mirror, mean, colour and scale as DALI operators.

    Args:
        config: the recipe.
        statistics: of the training set.
        reader: what is read, and on which device.
        defer_mean_image: leave the mean image to :class:`pipeline.loader.mean_image.MeanImage`, where that can be.

    Attributes:
        mean: (C,) float32 channel mean, zeros where the recipe subtracts none or an image.
        std: (C,) float32, ones where the recipe does not divide.
        deferred_mean_image: (H, W, C) mean image that is still to be subtracted, or None.
    """

    def __init__(
        self, config: LoaderConfig, statistics: Statistics, reader: Reader, *, defer_mean_image: bool = False
    ) -> None:
        self.config = config
        self.device = "cpu" if reader.device_id is None else "gpu"
        self.height_px, self.width_px = reader.split.height_px, reader.split.width_px
        channels = len(statistics.mean)
        self.zeros = [0.0] * channels
        self.mean = (statistics.mean if config.mean == "channel" else np.zeros(channels)).astype(np.float32)
        std = np.where(statistics.std > 0, statistics.std, 1.0) if config.scale == "std" else np.ones(channels)
        self.std = std.astype(np.float32)
        self.mean_image = _mean_image(config, statistics)
        can_wait = config.mean in ("pixel", "centre") and config.scale != "standardise" and reader.device_id is None
        self.deferred_mean_image = self.mean_image if defer_mean_image and can_wait else None

    def __call__(self, pixels: Any, x: Any, y: Any, mirror: Any, mean: Any, std: Any, *, cropped: bool = False) -> Any:
        """uint8 HWC pixels to float32 CHW.

        Args:
            pixels: the pictures, already cropped if ``cropped``.
            x, y: crop position as a share of its range.
            mirror: 0/1.
            mean: (C,) channel mean less colour shift.
            std: (C,) channel deviation times colour divisor: the end of the colour noise changes it in mid-run.
            cropped: the decoder has cut out the crop.
        """
        fn = _dali().fn
        window = {"crop": (self.config.crop_px, self.config.crop_px), "crop_pos_x": x, "crop_pos_y": y}
        result = fn.crop_mirror_normalize(
            pixels, mirror=mirror, mean=mean, std=std, output_layout="CHW", **({} if cropped else window)
        )
        if self.mean_image is not None and self.deferred_mean_image is None:
            result = result - self._aligned(mirror, std, window)
        if self.config.scale == "standardise":
            result = fn.normalize(result, epsilon=STANDARDISE_EPSILON)
        return result

    def _aligned(self, mirror: Any, std: Any, window: dict[str, Any]) -> Any:
        """The mean image under each crop, mirrored with it, or always its centre: CHW, scaled like the crops."""
        fn, types = _dali().fn, _dali().types
        image = np.ascontiguousarray(self.mean_image, np.float32)
        constant = types.Constant(image, dtype=types.FLOAT, layout="HWC", device=self.device)
        if self.config.mean == "centre":
            mirror, window = 0, {"crop": window["crop"], "rounding": "truncate"}  # DALI's default place is the middle
        # A second fused kernel over the mean image costs less than subtracting before the crop would (measured).
        return fn.crop_mirror_normalize(
            constant, mirror=mirror, mean=self.zeros, std=std, output_layout="CHW", **window
        )


def _mean_image(config: LoaderConfig, statistics: Statistics) -> np.ndarray | None:
    if config.mean not in ("pixel", "centre"):
        return None
    if statistics.mean_image is None:
        raise ConfigError(f"data.mean is {config.mean!r}, but the data set has no mean image: use mean = 'channel'")
    return statistics.mean_image


def read_encoded(reader: Reader) -> tuple[Any, Any, Any]:
    """The reader: encoded pictures, label text (padded), source of each sample (padded)."""
    fn = _dali().fn
    encoded, labels = fn.readers.webdataset(
        paths=list(reader.split.tars),
        index_paths=list(reader.split.indexes),
        ext=[reader.split.manifest.picture.extension, "cls"],
        missing_component_behavior="error",  # the default makes empty tensors, silently
        name="Reader",
        pad_last_batch=True,
        num_shards=reader.replicas,
        shard_id=reader.replica,
        random_shuffle=reader.shuffle,
        dont_use_mmap=not reader.config.mmap,
        **_shuffling(reader),
    )
    return encoded, fn.pad(labels), fn.pad(fn.get_property(encoded, key="source_info"))


def decode(reader: Reader, encoded: Any, roi: dict[str, Any] | None = None) -> Any:
    """The decoder: uint8 HWC pixels, on the reader's device; cropped to ``roi`` if given (CPU)."""
    fn, types = _dali().fn, _dali().types
    picture = reader.split.manifest.picture
    on_gpu = reader.device_id is not None
    if picture.encoding == "raw":
        shape = [reader.split.height_px, reader.split.width_px, picture.channels]
        return fn.reshape(encoded.gpu() if on_gpu else encoded, shape=shape, layout="HWC")
    options: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.GRAY if picture.channels == 1 else types.RGB,
        "adjust_orientation": picture.encoding == "original",  # prepare has applied it to everything it encoded
    }
    if on_gpu:
        options["jpeg_fancy_upsampling"] = True  # the CPU decoder's chroma, so that both give the same pixels
        options["hw_decoder_load"] = reader.config.hw_decoder_load
    if roi is None:
        return fn.decoders.image(encoded, **options)
    return fn.decoders.image_crop(encoded, **options, **roi)


def encoded_graph(reader: Reader) -> tuple[Any, ...]:
    """Reads only: encoded pictures, source text."""
    encoded, _, source = read_encoded(reader)
    return encoded, source


def decoded_graph(reader: Reader) -> tuple[Any, ...]:
    """Reads and decodes whole pictures."""
    return (decode(reader, read_encoded(reader)[0]),)


def cropped_graph(reader: Reader, feed: Any) -> tuple[Any, ...]:
    """Reads and decodes as :func:`training_graph` does, and stops there: uint8 pixels; of raw pictures the crops."""
    encoded = read_encoded(reader)[0]
    x, y = _draws(lambda info: feed(info)[1:3], 2)
    pixels = decode(reader, encoded, _roi(reader, x, y))
    if reader.split.manifest.picture.encoding == "raw":
        pixels = _dali().fn.crop(pixels, crop=(reader.config.crop_px,) * 2, crop_pos_x=x, crop_pos_y=y)
    return (pixels,)


def _shuffling(reader: Reader) -> dict[str, Any]:
    seed = reader_seed(reader.seed)
    if not reader.shuffle:
        return {"seed": seed}
    return {
        "seed": seed,
        "initial_fill": reader.config.shuffle_buffer,
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": seed,
    }


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
    _check_device(reader)
    try:
        pipeline = define_pipeline(reader, graph, checkpointing=checkpointing, checkpoint=checkpoint)
        pipeline.build()
    except RuntimeError as error:
        raise DatasetError(f"DALI cannot open {reader.split.folder}: {reason_of(error)}") from error
    return pipeline


def _check_device(reader: Reader) -> None:
    if reader.device_id is None:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if reader.device_id >= found:
        raise ConfigError(
            f"device is {reader.device!r}: this machine has {found} CUDA devices; use cpu or an existing one"
        )


def reason_of(error: BaseException) -> str:
    """What happened, out of DALI's long message: the line after ``encountered:``, or the last that says something."""
    text = str(error).split("C++ context:")[0]
    lines = [line.strip() for line in text.rsplit("encountered:", 1)[-1].splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Current pipeline object", "Critical error"))]
    return (lines[0] if "encountered:" in text else lines[-1]) if lines else type(error).__name__


def positions(geometry: np.ndarray, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """Crop offsets as DALI wants them: shares of their range, float32; its rounding gives the offset back exactly."""
    x = geometry[:, 0] / max(1, reader.split.width_px - reader.config.crop_px)
    y = geometry[:, 1] / max(1, reader.split.height_px - reader.config.crop_px)
    return x.astype(np.float32), y.astype(np.float32)


def training_graph(
    reader: Reader, normaliser: Normaliser, feed: Any, *, part: int = 0, parts: int = 1
) -> tuple[Any, ...]:
    """Outputs images, label text, source text, geometry, colour shift; of the images one part of ``parts`` only.

    Args:
        reader: what to read.
        normaliser: what to make of it.
        feed: callback of DALI's external source: BatchInfo to geometry (N, 3) int32, x and y (N,) float32, mirror (N,)
            int32, shift (N, C), channel mean less shift (N, C) and deviation times divisor (N, C) float32.
        part, parts: rows to decode: an equal part of the batch, see :class:`pipeline.loader.share.BatchShare`.
    """
    encoded, labels, source = read_encoded(reader)
    geometry, x, y, mirror, shift, mean, std = _draws(feed, 7)
    encoded, x, y, mirror, mean, std = _part_of(reader, (encoded, x, y, mirror, mean, std), part, parts)
    roi = _roi(reader, x, y)
    pixels = decode(reader, encoded, roi)
    images = normaliser(pixels, x, y, mirror, mean, std, cropped=roi is not None)
    return images, labels, source, geometry, shift


def split_graph(reader: Reader, feed: Any, *, part: int, parts: int) -> tuple[Any, ...]:
    """As :func:`training_graph`, but decodes one part of each batch only, to uint8 CHW crops, mirrored.

    Labels, sources and draws are those of the whole batch.
    """
    fn, types = _dali().fn, _dali().types
    encoded, labels, source = read_encoded(reader)
    geometry, x, y, mirror, shift = _draws(lambda info: feed(info)[:5], 5)
    encoded, x, y, mirror = _part_of(reader, (encoded, x, y, mirror), part, parts)
    roi = _roi(reader, x, y)
    window = {} if roi else {"crop": (reader.config.crop_px,) * 2, "crop_pos_x": x, "crop_pos_y": y}
    crops = fn.crop_mirror_normalize(
        decode(reader, encoded, roi), mirror=mirror, dtype=types.UINT8, output_layout="CHW", **window
    )
    return crops, labels, source, geometry, shift


def _draws(feed: Any, count: int) -> Any:
    return _dali().fn.external_source(source=feed, batch=True, batch_info=True, num_outputs=count)


def _part_of(reader: Reader, nodes: tuple[Any, ...], part: int, parts: int) -> tuple[Any, ...]:
    """One part of a batch. ``_conditional.split`` is what DALI's own ``if`` compiles to; used directly it gives a
    smaller batch instead of one merged again."""
    if parts == 1:
        return nodes
    fn = _dali().fn
    mine = np.arange(reader.batch_size) * parts // reader.batch_size == part
    predicate = fn.external_source(source=lambda _: list(mine), batch=True, batch_info=True)
    return tuple(fn._conditional.split(node, predicate=predicate)[0] for node in nodes)


def _roi(reader: Reader, x: Any, y: Any) -> dict[str, Any] | None:
    """The crop for the decoder, where it can stop at the crop's edge: 7 % faster, and the same pixels (tested)."""
    if reader.device_id is not None or reader.split.manifest.picture.encoding not in ("jpeg", "png"):
        return None
    return {"crop": (reader.config.crop_px,) * 2, "crop_pos_x": x, "crop_pos_y": y}


def evaluation_graph(reader: Reader, normaliser: Normaliser, views: str) -> tuple[Any, ...]:
    """Outputs images (10 views stacked in a new first dimension if ``views`` is ``ten``), label text, source text."""
    split = reader.split
    size = {"height_px": split.height_px, "width_px": split.width_px, "crop_px": reader.config.crop_px}
    geometry = ten_views(**size) if views == "ten" else centre_geometry(1, **size)
    encoded, labels, source = read_encoded(reader)
    pixels = decode(reader, encoded)
    mean, std = normaliser.mean.tolist(), normaliser.std.tolist()
    pictures = [
        normaliser(pixels, float(x), float(y), int(mirror), mean, std)
        for x, y, mirror in zip(*positions(geometry, reader), geometry[:, 2], strict=True)
    ]
    return (_dali().fn.stack(*pictures) if views == "ten" else pictures[0]), labels, source
