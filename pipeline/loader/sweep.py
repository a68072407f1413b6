"""How much of the JPEG decoding the GPU's hardware decoder should take: measured, since the best share differs."""

import dataclasses
import logging
import time

from pipeline.loader.graph import Reader, build_pipeline, decoded_graph

SHARES = (0.0, 0.25, 0.5, 0.65, 0.75, 0.85, 1.0)
DEFAULT_SHARE = 0.65  # DALI's own
_WARM_UP = 4
_BATCHES = 12
_LOGGER = logging.getLogger(__name__)


def measure_shares(reader: Reader) -> dict[float, float]:
    """Images a second of reading and decoding for each share of :data:`SHARES`; takes some seconds."""
    return {share: _measure(reader, share) for share in SHARES}


def _measure(reader: Reader, share: float) -> float:
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
    share = DEFAULT_SHARE
    if reader.device_id is not None and reader.split.manifest.picture.encoding in ("jpeg", "original"):
        rates = measure_shares(reader)
        share = max(rates, key=lambda candidate: rates[candidate])
        _LOGGER.info("hw_decoder_load %.2f chosen out of %s images/s", share, {k: round(v) for k, v in rates.items()})
    return dataclasses.replace(reader, config=dataclasses.replace(reader.config, hw_decoder_load=share))
