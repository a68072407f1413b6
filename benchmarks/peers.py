"""What others make and load data sets with, each in a process of its own; its packages may be in another environment.

    python benchmarks/peers.py litdata-optimize IMAGES OUTPUT        prints {"rate": images/s, "version": "..."}

Packages: ``pip install -e '.[bench-peers]'``, here or in an environment of their own (``--peers-python``). Where one is
missing or fails, the reason is printed and recorded instead: {"skipped": "..."}.

    litdata-optimize, mds-writer    Pillow's decoding, shorter side to 256, center, JPEG 90 in Python; all cores, one
    daft                            Daft's own operators: decode, 256x256 (without a crop), JPEG; parquet; all cores
    litdata-load, mds-load          decoding, crop, mirror, mean per channel, batch 128, a worker a core
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
PACKAGES = {"litdata": "litdata", "mds": "mosaicml-streaming", "daft": "daft"}
BATCH, SIDE, CROP, QUALITY = 128, 256, 224, 90
EMPTY_THE_QUEUE = 6  # as in loader_speed.py
LIMIT_S = 900


def ask(name: str, *arguments: object, python: str = sys.executable) -> dict[str, Any]:
    """Runs one peer; its rate and version, or why it was skipped."""
    command = [python, __file__, name, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"skipped": str(error)}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"skipped": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def sample(path: str) -> dict[str, Any]:
    """One image, resized and encoded as most scripts do it."""
    import io

    from PIL import Image

    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return {"jpg": buffer.getvalue(), "cls": int(Path(path).parent.name.lstrip("clas-n"))}


def litdata_optimize(paths: list[str], output: str) -> None:
    """LitData, a worker a core."""
    import litdata

    litdata.optimize(sample, paths, output_dir=output, chunk_size=250, num_workers=CORES)


def mds_writer(paths: list[str], output: str) -> None:
    """MosaicML's writer, one process."""
    from streaming import MDSWriter

    with MDSWriter(out=output, columns={"jpg": "bytes", "cls": "int"}) as writer:
        for path in paths:
            writer.write(sample(path))


def daft_parquet(paths: list[str], output: str) -> None:
    """Daft's own image operators, on all cores."""
    import daft

    table = daft.from_pydict({"path": paths})
    image = daft.col("path").download().decode_image(mode="RGB").resize(SIDE, SIDE)
    table.select(image.encode_image("JPEG").alias("jpg")).write_parquet(output)


def make(function: Callable[[list[str], str], None], images: str, output: str) -> float:
    """Images/s of a maker, its start included."""
    paths = sorted(str(path) for path in Path(images).rglob("*") if path.suffix in (".JPEG", ".jpg"))
    start_s = time.perf_counter()
    function(paths, output)
    return len(paths) / (time.perf_counter() - start_s)


def to_batch(samples: list[dict[str, Any]]) -> Any:
    """The recipe ``channel`` of loader_speed.py: decode, crop, mirror, mean per channel; (128, 3, 224, 224) float32."""
    import io

    import torch
    from PIL import Image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(CROP),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize([124.0, 117.0, 104.0], [1.0] * 3),
        ]
    )
    return torch.stack([transform(Image.open(io.BytesIO(row["jpg"])).convert("RGB")) for row in samples])


def litdata_batches(folder: str) -> Iterator[Any]:
    """LitData's streaming loader."""
    import litdata

    data = litdata.StreamingDataset(folder, shuffle=True, drop_last=True)
    while True:
        yield from litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=CORES, collate_fn=to_batch)


def mds_batches(folder: str) -> Iterator[Any]:
    """MosaicML's streaming loader."""
    import streaming
    import torch

    data = streaming.StreamingDataset(local=folder, shuffle=True, batch_size=BATCH)
    while True:
        loader = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=CORES, collate_fn=to_batch)
        yield from (batch for batch in loader if len(batch) == BATCH)


def load(batches: Iterator[Any], seconds: float) -> float:
    """Images/s of one interval, after batches that only empty the queue."""
    for _ in range(EMPTY_THE_QUEUE):
        next(batches)
    start_s, count = time.perf_counter(), 0
    while time.perf_counter() - start_s < seconds:
        assert tuple(next(batches).shape) == (BATCH, 3, CROP, CROP)
        count += 1
    return count * BATCH / (time.perf_counter() - start_s)


MAKERS = {"litdata-optimize": litdata_optimize, "mds-writer": mds_writer, "daft": daft_parquet}
LOADERS = {"litdata-load": litdata_batches, "mds-load": mds_batches}


def main() -> None:
    """``NAME IMAGES OUTPUT`` of a maker, ``NAME FOLDER SECONDS`` of a loader."""
    name, source, last = sys.argv[1:]
    version = importlib.metadata.version(PACKAGES[name.partition("-")[0]])
    rate = make(MAKERS[name], source, last) if name in MAKERS else load(LOADERS[name](source), float(last))
    print(json.dumps({"rate": rate, "version": version}), flush=True)
    os._exit(0)  # some leave threads behind


if __name__ == "__main__":
    main()
