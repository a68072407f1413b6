"""How fast is the loader beside its peers? All in one process, in turns, on the same real photos.

    python benchmarks/loader_speed.py --work /tmp/loader-bench            about 6 minutes on 2 cores
    python benchmarks/loader_speed.py --work /tmp/loader-bench --count 256 --rounds 2 --seconds 0.5      a smoke test

Cases, batch 128 of 224-px crops, float32:

    whole           pipeline.loader.batches.TrainingLoader, the paper's recipe (crop, mirror, mean image, PCA color)
    bare            a hand-written DALI pipeline: the same reading, decoding, crop, mirror, mean image and color with
                    DALI's operators and random numbers, and nothing else
    whole-channel   the same loader with a mean per channel instead of the mean image
    webdataset      webdataset + Pillow + torchvision in a DataLoader of 2 workers; mean per channel, no color
    webdataset-paper    the same with the paper's recipe: the work that whole does
    whole-raw       TrainingLoader, the paper's recipe, on raw uint8 shards of the same images
    channel-raw     whole-channel on raw shards
    two-each        two loaders, one per tower, both decode the whole batch (decode = "replicated"); what both have
    two-split       each decodes half and hands its uint8 crops to the other (decode = "sharded"), within a process
    null            hands out one ready batch: what the harness itself costs
    litdata-load, mds-load    LitData's and MosaicML's streaming loaders, a worker a core, the recipe of webdataset;
                    each interval in a process of its own (peers.py; skipped where not installed)

Each round gives every case one interval of some seconds, after batches that only empty its queue; the figures are
medians over the rounds. The results go to benchmarks/results/DATE_MACHINE_loader_speed.json.
"""

import argparse
import dataclasses
import functools
import os
import queue
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from harness import CORES, ROOT, describe_machine, make_parser, ratio, spread, take_turns, write_results
from photos import prepare_shards
from PIL import Image

from pipeline.loader.batch import SplitFeed
from pipeline.loader.batches import TrainingLoader
from pipeline.loader.bench import BenchOptions, run_bench
from pipeline.loader.config import LoaderConfig
from pipeline.loader.open_split import Statistics, open_split, read_statistics

BATCH = 128
CROP = 224
EMPTY_THE_QUEUE = 6  # batches an interval begins with, not timed: more than any case has prepared while it waited
PAPER = LoaderConfig(crop_px=CROP, mean="image", color="eigenvalue")
CHANNEL = dataclasses.replace(PAPER, mean="channel")


def ours(folder: Path, config: LoaderConfig) -> Iterator[torch.Tensor]:
    """The loader under test."""
    loader = TrainingLoader(folder, config, batch_size=BATCH, seed=0)
    while True:
        yield loader.next().images


def bare(folder: Path, threads: int) -> Iterator[torch.Tensor]:
    """The floor: the same operators without keys, checks, fingerprints, checkpoints or reproducible draws."""
    from nvidia.dali import fn, pipeline_def, types

    split = open_split(folder, "train")
    mean_image = read_statistics(folder, split.manifest).mean_image
    assert mean_image is not None

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, seed=0)
    def pipeline() -> Any:
        encoded, labels = fn.readers.webdataset(
            paths=list(split.tars),
            index_paths=list(split.indexes),
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=4096,  # samples
        )
        window = {
            "crop": (CROP, CROP),
            "crop_pos_x": fn.random.uniform(range=[0.0, 1.0]),
            "crop_pos_y": fn.random.uniform(range=[0.0, 1.0]),
        }
        mirror = fn.random.coin_flip()
        pixels = fn.decoders.image_crop(encoded, **window)
        images = fn.crop_mirror_normalize(pixels, mirror=mirror, mean=fn.random.normal(shape=3), std=[1.0] * 3)
        constant = types.Constant(mean_image.astype(np.float32), layout="HWC")
        means = fn.crop_mirror_normalize(constant, mirror=mirror, mean=[0.0] * 3, std=[1.0] * 3, **window)
        return images - means, labels

    built = pipeline()
    built.build()
    while True:
        images, _ = built.run()
        yield torch.from_dlpack(images.as_tensor())


def channel_transform(statistics: Statistics) -> Callable[[Image.Image], torch.Tensor]:
    """Crop, mirror and mean per channel, as torchvision's documentation writes it."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomCrop(CROP),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize(statistics.mean.tolist(), [1.0] * 3),
        ]
    )


def paper_transform(statistics: Statistics) -> Callable[[Image.Image], torch.Tensor]:
    """The paper's recipe, the work that ``whole`` does: crop, mean image, mirror, PCA color."""
    from torchvision.transforms.v2 import functional

    assert statistics.mean_image is not None
    mean_image = torch.from_numpy(statistics.mean_image.transpose(2, 0, 1).astype(np.float32)).contiguous()
    directions = torch.from_numpy((statistics.eigenvectors * statistics.eigenvalues / 255).astype(np.float32))

    def transform(image: Image.Image) -> torch.Tensor:
        x, y = torch.randint(image.width - CROP + 1, (2,)).tolist()
        crop = functional.pil_to_tensor(image.crop((x, y, x + CROP, y + CROP))).float()
        crop -= mean_image[:, y : y + CROP, x : x + CROP]
        crop += (directions @ (torch.randn(3) * 0.1))[:, None, None]
        return crop.flip(-1) if torch.rand(()) < 0.5 else crop

    return transform


def webdataset_peer(
    folder: Path, recipe: Callable[[Statistics], Callable[[Image.Image], torch.Tensor]]
) -> Iterator[torch.Tensor]:
    """What most people use."""
    import webdataset

    split = open_split(folder, "train")
    transform = recipe(read_statistics(folder, split.manifest))
    data = (
        webdataset.WebDataset(list(split.tars), shardshuffle=True, resampled=True, seed=0)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH, partial=False)
    )
    workers = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, prefetch_factor=2)
    for images, _ in workers:
        yield images


class Meeting:
    """Two threads exchange their crops: the cheapest link there is, so the split's cost is its own."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.parts: list[torch.Tensor] = [torch.empty(0), torch.empty(0)]

    def exchange(self, part: int, crops: torch.Tensor) -> torch.Tensor:
        """The whole batch."""
        self.parts[part] = crops
        self.barrier.wait()
        whole = torch.cat(self.parts)
        self.barrier.wait()
        return whole


def two_towers(folder: Path, decode: str) -> Iterator[torch.Tensor]:
    """Batches that both towers have got; each tower a thread with its own loader, one batch ahead at most."""
    meeting = Meeting()
    queues: list[queue.Queue[torch.Tensor]] = [queue.Queue(1), queue.Queue(1)]

    def tower(part: int) -> None:
        config = dataclasses.replace(PAPER, decode=decode)
        split = SplitFeed(part, 2, lambda crops: meeting.exchange(part, crops))
        loader = TrainingLoader(folder, config, batch_size=BATCH, seed=0, split_feed=split)
        while True:
            queues[part].put(loader.next().images)

    for part in range(2):
        threading.Thread(target=tower, args=(part,), daemon=True).start()
    while True:
        images, _ = queues[0].get(), queues[1].get()
        yield images


def null() -> Iterator[torch.Tensor]:
    """The harness alone."""
    images = torch.zeros(BATCH, 3, CROP, CROP)
    while True:
        yield images


def rate(batches: Iterator[torch.Tensor], seconds: float) -> float:
    """Images a second of one interval."""
    for _ in range(EMPTY_THE_QUEUE):
        next(batches)
    begin_s, count = time.perf_counter(), 0
    while time.perf_counter() - begin_s < seconds:
        assert next(batches).shape == (BATCH, 3, CROP, CROP)
        count += 1
    return count * BATCH / (time.perf_counter() - begin_s)


def make_cases(folders: dict[str, Path]) -> dict[str, Iterator[torch.Tensor]]:
    """Endless batches of every case."""
    return {
        "whole": ours(folders["jpeg"], PAPER),
        "bare": bare(folders["jpeg"], CORES),
        "whole-channel": ours(folders["jpeg"], CHANNEL),
        "webdataset": webdataset_peer(folders["jpeg"], channel_transform),
        "webdataset-paper": webdataset_peer(folders["jpeg"], paper_transform),
        "whole-raw": ours(folders["raw"], PAPER),
        "channel-raw": ours(folders["raw"], CHANNEL),
        "two-each": two_towers(folders["jpeg"], "replicated"),
        "two-split": two_towers(folders["jpeg"], "sharded"),
        "null": null(),
    }


def other_loaders(args: argparse.Namespace) -> dict[str, Any]:
    """Images/s of LitData's and MosaicML's loaders on the same photos, made into their formats; or why not."""
    source = args.work / f"photos-{args.count}"
    found: dict[str, Any] = {}
    for maker, name in (("litdata-optimize", "litdata-load"), ("mds-writer", "mds-load")):
        folder = args.work / f"{maker}-{args.count}"
        row = {} if folder.exists() else peers.ask(maker, source, folder, python=args.peers_python)
        rows = []
        while "skipped" not in row and len(rows) < args.rounds:
            row = peers.ask(name, folder, args.seconds, python=args.peers_python)
            rows.append(row)
            print(f"{name}: {row}", flush=True)
        if "skipped" in row:
            shutil.rmtree(folder, ignore_errors=True)
        found[name] = row if "skipped" in row else spread([row["rate"] for row in rows]) | {"version": row["version"]}
    return found


def first_batch(folder: Path) -> dict[str, float]:
    """Seconds to the first batch in a fresh process: with and without the imports."""
    program = (
        "import time; t = time.perf_counter()\n"
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import nvidia.dali.fn, torch; from pathlib import Path\n"
        "from pipeline.loader.batches import LoaderConfig, TrainingLoader\n"
        "i = time.perf_counter()\n"
        f"config = LoaderConfig(crop_px={CROP}, mean='image', color='eigenvalue')\n"
        f"TrainingLoader(Path(sys.argv[1]), config, batch_size={BATCH}, seed=0).next()\n"
        "e = time.perf_counter(); print(e - i, e - t)"
    )
    runs = []
    for _ in range(5):
        command = [sys.executable, "-c", program, str(folder), str(ROOT)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append([float(text) for text in output.split()])
    opening, everything = (statistics.median(column) for column in zip(*runs, strict=True))
    return {"first_batch_s": opening, "first_batch_with_imports_s": everything}


def memory_by_epoch(folder: Path, epochs: int = 40) -> list[float]:
    """Resident memory (10**6 bytes) after each epoch."""
    loader = TrainingLoader(folder, PAPER, batch_size=BATCH, seed=0)
    found = []
    for _ in range(epochs):
        for _ in range(loader.steps_per_epoch):
            loader.next()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    return found


PAIRS = (
    ("whole", "bare"),
    ("whole", "webdataset-paper"),
    ("whole-channel", "webdataset"),
    ("whole", "webdataset"),
    ("whole-raw", "whole"),
    ("two-split", "two-each"),
    ("channel-raw", "whole-channel"),
)


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, work="the data sets, which are made once and kept", rounds=7)
    parser.add_argument("--count", type=int, default=2048, help="images")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of an interval")
    parser.add_argument("--peers-python", default=sys.executable, metavar="PATH", help="interpreter with bench-peers")
    args = parser.parse_args()
    machine = describe_machine("torch", "torchvision", "nvidia-dali-cuda130", "webdataset", "pillow", "numpy")
    folders = prepare_shards(args.work, args.count, val_fraction=0)
    others = other_loaders(args)
    memory = memory_by_epoch(folders["jpeg"])
    cases = {name: functools.partial(rate, batches, args.seconds) for name, batches in make_cases(folders).items()}
    rates = take_turns(cases, args.rounds, warm_up=1, show=lambda row: f"{row:,.0f} images/s")
    ratios = {f"{a} / {b}": ratio(rates[a], rates[b]) for a, b in PAIRS}
    options = BenchOptions(seconds=args.seconds / 2, repeats=args.rounds)
    result = {
        "ratios": ratios,
        "images_per_s": {name: spread(values) for name, values in rates.items()},
        "other loaders": others,
        **first_batch(folders["jpeg"]),
        "memory_mb_after_epoch": memory,
        "stages": {name: dataclasses.asdict(run_bench(folder, PAPER, options)) for name, folder in folders.items()},
    }
    for name, row in ratios.items():
        print(f"{name:28} {row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f})")
    write_results(args.results, machine, result)
    sys.stdout.flush()
    os._exit(0)  # the towers' threads wait for each other for ever


if __name__ == "__main__":
    main()
