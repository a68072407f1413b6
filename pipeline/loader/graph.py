"""The pipeline as DALI operators: decoder, then crop, mirror, mean, color and scale in one. Only here is DALI.

On a GPU it ends at uint8 crops, and a kernel of ours does the rest: :mod:`pipeline.loader.net_input`.

The stored bytes come from :mod:`pipeline.loader.samples`, as memory that DALI reads without a copy.

The device is a parameter: any graph runs on either. DALI is imported when a pipeline is built, so everything that only
describes a loader works where DALI is not installed.
"""

import dataclasses
import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, DatasetError
from pipeline.loader.config import LoaderConfig
from pipeline.loader.open_split import OpenSplit
from pipeline.loader.order import Order
from pipeline.loader.samples import SampleReader

DECODER_SHARES = (0.0, 0.25, 0.5, 0.65, 0.75, 0.85, 1.0)  # of a batch's JPEGs for the GPU's hardware decoder
_WARM_UP, _BATCHES = 4, 12
_LOGGER = logging.getLogger(__name__)


def _dali() -> Any:
    """DALI's operators and types; typed Any because DALI makes them at import time."""
    import nvidia.dali

    return nvidia.dali


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What DALI decodes, and how.

    Attributes:
        split: the samples.
        config: the recipe.
        batch_size: images that this process decodes of a batch, at most.
        device: ``cpu`` or ``cuda:N``.
    """

    split: OpenSplit
    config: LoaderConfig
    batch_size: int
    device: str

    @property
    def device_id(self) -> int | None:
        """The CUDA device's number, None on the CPU."""
        kind, _, number = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
            raise ConfigError(f"device is {self.device!r}: the loader knows cpu and cuda:N")
        return None if kind == "cpu" else int(number or 0)


# Of a batch's number since the pipeline began: the stored images, and an array (N, ...) for each further input.
Feed = Callable[[int], tuple[Any, ...]]


def _inputs(feed: Feed, count: int) -> Any:
    """The inputs of a graph. DALI reads the arrays where they are, so whoever feeds them holds them meanwhile."""
    dali = _dali()
    tensor = dali.tensors.TensorCPU  # made here: DALI asks each array whether it is torch's, MXNet's, on a GPU...

    def source(info: Any) -> tuple[Any, ...]:
        images, *arrays = feed(info.iteration)
        return ([tensor(image) for image in images], *arrays)

    return dali.fn.external_source(source=source, batch=True, batch_info=True, num_outputs=count, no_copy=True)


def decode(decoding: Decoding, encoded: Any, roi: dict[str, Any] | None = None) -> Any:
    """The decoder: uint8 HWC pixels, on the reader's device; cropped to ``roi`` if given (CPU)."""
    fn, types = _dali().fn, _dali().types
    image = decoding.split.manifest.image
    on_gpu = decoding.device_id is not None
    if image.encoding == "raw":
        shape = [decoding.split.height_px, decoding.split.width_px, image.channels]
        return fn.reshape(encoded.gpu() if on_gpu else encoded, shape=shape, layout="HWC")
    options: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.GRAY if image.channels == 1 else types.RGB,
        "adjust_orientation": image.encoding == "original",  # prepare has applied it to everything it encoded
    }
    if on_gpu:
        options["jpeg_fancy_upsampling"] = True  # the CPU decoder's chroma, so that both give the same pixels
        options["hw_decoder_load"] = decoding.config.hw_decoder_load
    if roi is None:
        return fn.decoders.image(encoded, **options)
    return fn.decoders.image_crop(encoded, **options, **roi)


def decoded_graph(decoding: Decoding, feed: Feed) -> tuple[Any, ...]:
    """Decodes whole images."""
    return (decode(decoding, _inputs(feed, 1)[0]),)


def define_pipeline(decoding: Decoding, graph: Any) -> Any:
    """Defines a DALI pipeline out of ``graph``, a function that returns its outputs; needs no GPU yet."""
    definition = _dali().pipeline_def(
        graph,
        batch_size=decoding.batch_size,
        num_threads=decoding.config.threads or len(os.sched_getaffinity(0)),
        device_id=decoding.device_id,
        prefetch_queue_depth=decoding.config.prefetch,
    )
    return definition()


def check_device(decoding: Decoding) -> None:
    """Raises ConfigError where there is no such device."""
    if decoding.device_id is not None:
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if decoding.device_id >= found:
            raise ConfigError(
                f"device is {decoding.device!r}: this machine has {found} CUDA devices; use cpu or an existing one"
            )


def build_pipeline(decoding: Decoding, graph: Any) -> Any:
    """Defines and builds a pipeline.

    Raises:
        ConfigError: there is no such device.
        DatasetError: DALI cannot build it.
    """
    check_device(decoding)
    try:
        pipeline = define_pipeline(decoding, graph)
        pipeline.build()
    except RuntimeError as error:
        raise DatasetError(f"DALI cannot open {decoding.split.folder}: {reason_of(error)}") from error
    return pipeline


def reason_of(error: BaseException) -> str:
    """What happened, out of DALI's long message: the line after ``encountered:``, or the last that says something."""
    text = str(error).split("C++ context:")[0]
    lines = [line.strip() for line in text.rsplit("encountered:", 1)[-1].splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Current pipeline object", "Critical error"))]
    return (lines[0] if "encountered:" in text else lines[-1]) if lines else type(error).__name__


def training_graph(decoding: Decoding, feed: Feed) -> tuple[Any, ...]:
    """Outputs images: float32 CHW, cropped, mirrored, their mean subtracted and divided, all in one pass.

    What is still to be done is :meth:`pipeline.loader.normalize.Normalizer.finish`.

    Args:
        decoding: what to decode.
        feed: gives images, x and y (N,) float32, mirror (N,) int32, and what to subtract and to divide by, (N, C)
            float32 each.
    """
    encoded, x, y, mirror, mean, std = _inputs(feed, 6)
    pixels, window = _decode_crops(decoding, encoded, x, y)
    images = _dali().fn.crop_mirror_normalize(pixels, mirror=mirror, mean=mean, std=std, output_layout="CHW", **window)
    return (images,)


def split_graph(decoding: Decoding, feed: Feed) -> tuple[Any, ...]:
    """As :func:`training_graph`, but outputs uint8 CHW crops, mirrored; fed without the last two."""
    encoded, x, y, mirror = _inputs(lambda number: feed(number)[:4], 4)
    fn, types = _dali().fn, _dali().types
    pixels, window = _decode_crops(decoding, encoded, x, y)
    crops = fn.crop_mirror_normalize(pixels, mirror=mirror, dtype=types.UINT8, output_layout="CHW", **window)
    return (crops,)


def crops_graph(decoding: Decoding, feed: Feed) -> tuple[Any, ...]:
    """Decodes and crops as :func:`training_graph` does, and stops there: uint8 HWC, not mirrored."""
    encoded, x, y = _inputs(lambda number: feed(number)[:3], 3)
    pixels, window = _decode_crops(decoding, encoded, x, y)
    return (_dali().fn.crop(pixels, **window) if window else pixels,)


def evaluation_graph(
    decoding: Decoding, feed: Feed, views: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> tuple[Any, ...]:
    """Outputs images, (V, C, S, S) a sample or (C, S, S) for a single view.

    Args:
        decoding: what to decode.
        feed: gives images.
        views: (V, 3) crop x, crop y, mirror.
        mean, std: (C,), what is subtracted and divided by.
    """
    fn = _dali().fn
    pixels = decode(decoding, _inputs(feed, 1)[0])
    images = [
        fn.crop_mirror_normalize(
            pixels,
            mirror=int(mirror),
            mean=mean.tolist(),
            std=std.tolist(),
            output_layout="CHW",
            **_window(decoding, float(x), float(y)),
        )
        for x, y, mirror in zip(*positions(views, decoding), views[:, 2], strict=True)
    ]
    return (images[0] if len(images) == 1 else fn.stack(*images),)


def evaluation_crops_graph(decoding: Decoding, feed: Feed, views: np.ndarray) -> tuple[Any, ...]:
    """As :func:`evaluation_graph`, but outputs uint8 HWC crops, not mirrored; a place of several views is cut once."""
    fn = _dali().fn
    pixels = decode(decoding, _inputs(feed, 1)[0])
    crops: dict[tuple[float, float], Any] = {}
    for place in (places := list(zip(*(axis.tolist() for axis in positions(views, decoding)), strict=True))):
        if place not in crops:
            crops[place] = fn.crop(pixels, **_window(decoding, *place))
    return (fn.stack(*(crops[place] for place in places)) if len(places) > 1 else crops[places[0]],)


def positions(geometry: np.ndarray, decoding: Decoding) -> tuple[np.ndarray, np.ndarray]:
    """Crop offsets as DALI wants them: shares of their range, float32; its rounding gives the offset back exactly."""
    x = geometry[:, 0] / max(1, decoding.split.width_px - decoding.config.crop_px)
    y = geometry[:, 1] / max(1, decoding.split.height_px - decoding.config.crop_px)
    return x.astype(np.float32), y.astype(np.float32)


def _window(decoding: Decoding, x: Any, y: Any) -> dict[str, Any]:
    return {"crop": (decoding.config.crop_px,) * 2, "crop_pos_x": x, "crop_pos_y": y}


def _decode_crops(decoding: Decoding, encoded: Any, x: Any, y: Any) -> tuple[Any, dict[str, Any]]:
    """Pixels, and the window that is still to be cut out of them.

    On a CPU the decoder can stop at the crop's edge: 7 % faster, and the same pixels (tested).
    """
    window = _window(decoding, x, y)
    if decoding.device_id is None and decoding.split.manifest.image.encoding in ("jpeg", "png"):
        return decode(decoding, encoded, window), {}
    return decode(decoding, encoded), window


def measure_decoder_shares(decoding: Decoding) -> dict[float, float]:
    """Images a second of reading and decoding for each of :data:`DECODER_SHARES`; takes some seconds."""
    order = Order(decoding.split.counts, decoding.batch_size, partial=decoding.split.num_samples < decoding.batch_size)
    held = _WARM_UP + _BATCHES + decoding.config.prefetch + 1
    samples = SampleReader(decoding.split, order, mapped=decoding.config.mmap, held=held)
    try:
        return {share: _measure_share(decoding, samples, share) for share in DECODER_SHARES}
    finally:
        samples.close()


def _measure_share(decoding: Decoding, samples: SampleReader, share: float) -> float:
    config = dataclasses.replace(decoding.config, hw_decoder_load=share)
    trial = dataclasses.replace(decoding, config=config)
    fed = []

    def feed(number: int) -> tuple[Sequence[np.ndarray]]:
        fed.append(samples.read(number))
        return (fed[-1].images,)

    pipeline = build_pipeline(trial, lambda: decoded_graph(trial, feed))
    try:
        for _ in range(_WARM_UP):
            pipeline.run()
        begin_s = time.perf_counter()
        for _ in range(_BATCHES):
            pipeline.run()
        return _BATCHES * trial.batch_size / (time.perf_counter() - begin_s)
    finally:
        del pipeline
        gc.collect()  # see RunningPipeline.close: its memory on the GPU, and its part of the decoder, are free again


def with_decoder_share(decoding: Decoding) -> Decoding:
    """With ``hw_decoder_load`` decided: measured where the config says -1 and a GPU decodes JPEGs."""
    if decoding.config.hw_decoder_load >= 0:
        return decoding
    share = LoaderConfig.hw_decoder_load
    if decoding.device_id is not None and decoding.split.manifest.image.encoding in ("jpeg", "original"):
        rates = measure_decoder_shares(decoding)
        share = max(rates, key=lambda candidate: rates[candidate])
        _LOGGER.info("hw_decoder_load %.2f chosen out of %s images/s", share, {k: round(v) for k, v in rates.items()})
    return dataclasses.replace(decoding, config=dataclasses.replace(decoding.config, hw_decoder_load=share))
