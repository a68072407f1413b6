"""Asks the decoder that DALI uses (nvImageCodec, CPU) what it makes of an image, before a training run has to."""

import functools
import importlib
from typing import Any

import numpy as np


def dali_accepts(data: bytes) -> bool:
    """Tells whether DALI's CPU decoder makes pixels of these bytes.

    One image that it refuses would end a whole DALI pipeline, which has no skip option (DALI #3913).
    """
    return _decoded(data) is not None


def dali_pixels(data: bytes) -> np.ndarray | None:
    """What DALI's CPU decoder makes of these bytes, EXIF orientation applied: uint8 (H, W, 3), None if it refuses."""
    decoded = _decoded(data)
    return None if decoded is None else np.asarray(decoded.cpu())


def _decoded(data: bytes) -> Any:
    stream, decoder, parameters = _decoder()
    return decoder.decode(stream(data), params=parameters)


@functools.cache
def _decoder() -> tuple[Any, Any, Any]:
    """The codec's stream class, a decoder and its parameters."""
    nvimgcodec: Any = importlib.import_module("nvidia.nvimgcodec")

    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
    )
    parameters = nvimgcodec.DecodeParams(color_spec=nvimgcodec.ColorSpec.SRGB, apply_exif_orientation=True)
    return nvimgcodec.CodeStream, decoder, parameters
