"""How fast does ``prepare`` turn ILSVRC archives into shards, beside the codec itself and beside its peers?

    python benchmarks/prepare.py --work /tmp/prepare-bench            about 20 minutes on 2 cores, 6 GB of disk
    python benchmarks/prepare.py --work /tmp/prepare-bench --pictures 3000 --rounds 1 --parts floor,prepare       a try

Pictures: 500x375 crops of real photos, about 100 kB each (ImageNet: 110), in an archive like the official one. Parts:

    floor      libjpeg-turbo alone: decode those bytes, encode the 256x256 pictures that prepare stores, nothing else
    prepare    python -m pipeline prepare, 1 and 2 workers; the rate is taken from the first to the last finished
               shard (start-up of Ray and workers apart); the whole command's is printed
    peers      webdataset's ShardWriter with Pillow, one process; Ray Data's write_webdataset with Pillow on the
               same cores. Both read extracted files, which spares them work that prepare does
    memory     peak resident memory of a worker for 1,000 and for 20,000 pictures
    plan       planning 1,281,167 entries of synthetic headers: seconds and peak memory

Rounds alternate between contestants; medians and ranges. Results: benchmarks/results/DATE_HARDWARE_prepare.json.
"""

import argparse
import datetime
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from photos import crops
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("floor", "prepare", "peers", "memory", "plan")
UNIQUE = 2000  # different pictures; larger archives repeat them
QUALITY = 98  # of the sources: gives about 100 kB, near the 110 kB of ImageNet
CLASSES = 10
SHARD_SIZE = 250
STORED_QUALITY = 90
FLOOR_S = 10.0
IMAGENET_TRAIN = 1_281_167


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for archives and outputs; archives are kept")
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/...)")
    args = parser.parse_args()
    parts = args.parts.split(",")
    args.work.mkdir(parents=True, exist_ok=True)
    archives = write_archives(args.work, args.pictures)
    rows = measure(args, archives, parts)
    result = {"environment": environment(), "arguments": sys.argv[1:], "bytes_per_picture": mean_size(archives)}
    result |= {"images_per_s": rows, "ratios": ratios(rows)}
    if "memory" in parts:
        result["worker_peak_mib"] = memory(args.work)
    if "plan" in parts:
        result["planning"] = planning(args.work)
    target = args.output or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_{hardware()}_prepare.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in result if key != "environment"}, indent=1))
    print(f"results: {target}")


def measure(args: argparse.Namespace, archives: Path, parts: list[str]) -> dict[str, dict[str, Any]]:
    """Every contestant once a round, in turns."""
    contestants: dict[str, Callable[[], float]] = {}
    if "floor" in parts:
        pictures = unique_pictures(args.work)[:300]
        contestants["floor, 1 process"] = lambda: floor(pictures, 1)
        contestants["floor, 2 processes"] = lambda: floor(pictures, 2)
    if "prepare" in parts:
        for workers in (1, 2):
            contestants[f"prepare, {workers} worker(s)"] = lambda workers=workers: prepare(args.work, archives, workers)
    if "peers" in parts:
        folder = extracted(args.work, min(args.pictures, UNIQUE))
        contestants["webdataset ShardWriter + Pillow, 1 process"] = lambda: shard_writer(args.work, folder)
        contestants["Ray Data write_webdataset + Pillow, 2 cores"] = lambda: ray_data(args.work, folder)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(args.rounds):
        for name, run in contestants.items():
            rates[name].append(run())
            print(f"round {number + 1}: {name}: {rates[name][-1]:,.0f} images/s", flush=True)
    return {
        name: {"median": statistics.median(row), "min": min(row), "max": max(row), "n": len(row)}
        for name, row in rates.items()
    }


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures the project promises something about."""
    names = {
        "prepare / floor, 1 core": ("prepare, 1 worker(s)", "floor, 1 process"),
        "prepare / floor, 2 cores": ("prepare, 2 worker(s)", "floor, 2 processes"),
        "prepare, 2 workers / 1": ("prepare, 2 worker(s)", "prepare, 1 worker(s)"),
        "prepare 1 worker / ShardWriter + Pillow": (
            "prepare, 1 worker(s)",
            "webdataset ShardWriter + Pillow, 1 process",
        ),
        "prepare 2 workers / Ray Data": ("prepare, 2 worker(s)", "Ray Data write_webdataset + Pillow, 2 cores"),
    }
    return {
        name: round(rows[top]["median"] / rows[bottom]["median"], 3)
        for name, (top, bottom) in names.items()
        if top in rows and bottom in rows
    }


def unique_pictures(work: Path) -> list[bytes]:
    """The sources as JPEG bytes; made once."""
    path = work / "unique.npz"
    if not path.exists():
        buffers = []
        for picture in crops(UNIQUE, 500, 375):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
            buffers.append(np.frombuffer(buffer.getvalue(), np.uint8))
        np.savez(work / "unfinished.npz", data=np.concatenate(buffers), sizes=[len(row) for row in buffers])
        (work / "unfinished.npz").rename(path)
    with np.load(path) as file:
        ends = np.cumsum(file["sizes"])
        data = file["data"].tobytes()
    return [data[end - size : end] for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]


def write_archives(work: Path, count: int) -> Path:
    """ILSVRC2012_img_train.tar with its inner tars, as the official one; made once a count."""
    folder = work / f"archives-{count}"
    if folder.exists():
        return folder
    pictures = unique_pictures(work)
    draft = work / "unfinished"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    with tarfile.open(draft / "ILSVRC2012_img_train.tar", "w", format=tarfile.GNU_FORMAT) as outer:
        for label in range(CLASSES):
            name = f"n{label:08d}"
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for number in range(label, count, CLASSES):
                    add(tar, f"{name}_{number}.JPEG", pictures[number % len(pictures)])
            add(outer, f"{name}.tar", inner.getvalue())
    draft.rename(folder)
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Appends one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def extracted(work: Path, count: int) -> Path:
    """The same pictures as class folders, for the peers."""
    folder = work / f"extracted-{count}"
    if not folder.exists():
        for number, data in enumerate(unique_pictures(work)[:count]):
            path = folder / f"n{number % CLASSES:08d}" / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def mean_size(archives: Path) -> int:
    """Mean bytes of a source picture, headers included."""
    count = int(archives.name.rsplit("-", 1)[1])
    return (archives / "ILSVRC2012_img_train.tar").stat().st_size // count


def floor(pictures: list[bytes], processes: int) -> float:
    """Images/s of decode + encode by libjpeg-turbo in some processes at once."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(codec_rate, [(pictures[:20], 0.5)] * processes)  # warm-up
        return sum(pool.map(codec_rate, [(pictures, FLOOR_S)] * processes, chunksize=1))


def codec_rate(task: tuple[list[bytes], float]) -> float:
    """Images/s of one process."""
    pictures, seconds = task
    stored = [stored_pixels(data) for data in pictures]
    start_s, count = time.perf_counter(), 0
    while time.perf_counter() - start_s < seconds:
        for data, pixels in zip(pictures, stored, strict=True):
            simplejpeg.decode_jpeg(data)
            simplejpeg.encode_jpeg(pixels, quality=STORED_QUALITY, colorsubsampling="420")
        count += len(pictures)
    return count / (time.perf_counter() - start_s)


def stored_pixels(data: bytes) -> np.ndarray:
    """What prepare encodes, made beforehand."""
    image = Image.open(io.BytesIO(data))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(image.resize((256, 256), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def prepare(work: Path, archives: Path, workers: int, probe: Callable[[], None] | None = None) -> float:
    """Images/s of our command between the first and the last finished shard."""
    output = work / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "prepare", "--source", "imagenet", "--input", archives]
    command += ["--output", output, "--workers", workers, "--shard-size", SHARD_SIZE, "--quality", STORED_QUALITY]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    rate = 0.0
    while process.poll() is None:
        rate = finished_rate(output, workers) or rate
        if probe:
            probe()
        time.sleep(0.05)
    stdout, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"prepare failed: {stderr}")
    print("   ", re.findall(r"prepared .*", stdout)[0], flush=True)
    return rate


def finished_rate(output: Path, workers: int) -> float | None:
    """Images/s from when every worker has finished its first shard to the last shard, by the records' times."""
    records = output / ".work" / "records"
    try:
        times = sorted(path.stat().st_mtime for path in records.glob("*.json"))
    except FileNotFoundError:
        return None  # the work folder was just removed
    if len(times) < workers + 2:
        return None
    return SHARD_SIZE * (len(times) - workers) / (times[-1] - times[workers - 1])


def shard_writer(work: Path, folder: Path) -> float:
    """Images/s of webdataset's ShardWriter with Pillow in this process."""
    import webdataset

    output = work / "peer"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    paths = sorted(folder.rglob("*.JPEG"))
    start_s = time.perf_counter()
    with webdataset.ShardWriter(str(output / "train-%06d.tar"), maxcount=SHARD_SIZE, verbose=0) as sink:
        for number, path in enumerate(paths):
            sink.write({"__key__": f"{number:08d}", "jpg": pillow(path.read_bytes()), "cls": int(path.parent.name[1:])})
    return len(paths) / (time.perf_counter() - start_s)


def pillow(data: bytes) -> bytes:
    """Shorter side to 256, centre, JPEG: as most scripts do it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((256, 256), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=STORED_QUALITY)
    return buffer.getvalue()


def ray_data(work: Path, folder: Path) -> float:
    """Images/s of Ray Data with Pillow on two cores, without Ray's start."""
    import ray

    output = work / "peer"
    shutil.rmtree(output, ignore_errors=True)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        ray.data.range(4).map(lambda row: row).materialize()  # warm-up: starts the workers
        start_s = time.perf_counter()
        rows = ray.data.read_binary_files(str(folder), include_paths=True).map(ray_row)
        rows.write_webdataset(str(output), encoder=None)  # its default would encode the JPEG again
        return sum(1 for _ in folder.rglob("*.JPEG")) / (time.perf_counter() - start_s)
    finally:
        ray.shutdown()


def ray_row(row: dict[str, Any]) -> dict[str, Any]:
    """One sample."""
    path = Path(row["path"])
    return {"__key__": path.stem, "jpg": pillow(row["bytes"]), "cls": str(int(path.parent.name[1:])).encode()}


def memory(work: Path) -> dict[str, float]:
    """Peak resident memory of the largest worker, for a small and a large archive, in MiB."""
    peaks = {}
    for count in (1000, 20_000):
        archives = write_archives(work, count)
        seen = [0.0]
        prepare(work, archives, 2, probe=lambda seen=seen: seen.append(max(seen[-1], worker_peak_mib())))
        peaks[f"{count:,} pictures"] = seen[-1]
        if count != 1000:
            shutil.rmtree(archives)
    return peaks


def worker_peak_mib() -> float:
    """The largest VmHWM of the Ray workers that run build_shard now."""
    peak = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::build_shard" in (path / "cmdline").read_bytes():
                found = re.search(r"VmHWM:\s+(\d+) kB", (path / "status").read_text())
                peak = max(peak, int(found.group(1)) / 1024 if found else 0.0)
        except OSError:
            continue  # it has just ended
    return peak


PLAN_SCRIPT = """
import resource, sys, time
from pathlib import Path
from pipeline.config import PrepareOptions
from pipeline.request import make_plan
from pipeline.sources import open_source
start_s = time.perf_counter()
options = PrepareOptions(source="imagenet", output=Path("out"), input=Path(sys.argv[1]))
listing = open_source(options).listing()
digest = listing.digest()
plan = make_plan(listing, options)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(len(listing.splits["train"]), len(plan), time.perf_counter() - start_s, peak)
"""


def planning(work: Path) -> dict[str, float]:
    """Lists, hashes and plans an archive of ImageNet's size whose pictures are 100 bytes."""
    folder = work / "headers"
    if not folder.exists():
        write_headers(folder)
    done = subprocess.run(
        [sys.executable, "-c", PLAN_SCRIPT, folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    entries, shards, seconds, peak = done.stdout.split()
    return {"entries": int(entries), "shards": int(shards), "seconds": float(seconds), "peak_mib": float(peak)}


def write_headers(folder: Path) -> None:
    """1,000 inner tars with 1,281,167 tiny members in all."""
    folder.mkdir()
    counts = np.full(1000, IMAGENET_TRAIN // 1000)
    counts[: IMAGENET_TRAIN % 1000] += 1
    with tarfile.open(folder / "unfinished", "w", format=tarfile.GNU_FORMAT) as outer:
        for label, count in enumerate(counts):
            name = f"n{label:08d}"
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for number in range(count):
                    add(tar, f"{name}_{number}.JPEG", bytes(100))
            add(outer, f"{name}.tar", inner.getvalue())
    (folder / "unfinished").rename(folder / "ILSVRC2012_img_train.tar")


def hardware() -> str:
    """CPU count as part of a file name."""
    return f"cpu{len(os.sched_getaffinity(0))}"


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = ("pillow", "simplejpeg", "torch", "ray", "webdataset", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model.group(1) if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


if __name__ == "__main__":
    main()
