"""How fast does ``prepare`` turn ILSVRC archives into shards, beside the codec itself and beside its peers?

    python benchmarks/prepare_speed.py --work DIR          about 18 minutes on 2 cores, 4 GB of disk
    python benchmarks/prepare_speed.py --work DIR --images 3000 --rounds 1 --parts floor,prepare          a try

Images: 500x375 crops of real photos, about 100 kB each (ImageNet: 110), in an archive like the official one. Parts:

    floor      libjpeg-turbo alone: decode those bytes, encode the 256x256 images that prepare stores, nothing else
    prepare    python -m pipeline prepare, 1, 2, 4, ... workers up to all cores; the rate is taken from the first to the
               last finished shard (start-up of Ray and workers apart); the whole command's is printed
    peers      webdataset's ShardWriter with Pillow, one process; Ray Data's write_webdataset with Pillow on two cores;
               LitData's optimize, Daft and MosaicML's MDSWriter as peers.py runs them (skipped where not installed;
               start-up included). All read extracted files, which spares them work that prepare does
    memory     peak resident memory of a worker for 1,000 and for 20,000 images
    plan       planning 1,281,167 entries of synthetic headers: seconds and peak memory

Cases take turns; medians and ranges. Floor and prepare also give processor time per image: the two kinds of ratio agree
on a machine where nothing else runs, and only there. Results: benchmarks/results/DATE_MACHINE_prepare_speed.json.
"""

import argparse
import dataclasses
import functools
import io
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import simplejpeg
from harness import CORES, ROOT, describe_machine, make_parser, spread, take_turns, write_results
from PIL import Image
from prepare_input import UNIQUE, extracted, unique_images, write_archives, write_headers

PARTS = ("floor", "prepare", "peers", "memory", "plan")
SHARD_SIZE = 250
STORED_QUALITY = 90
FLOOR_S = 10.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        rate: images/s by the clock on the wall.
        cpu_ms: processor time an image in ms, of the processes that make images; None where it is not known.
    """

    rate: float
    cpu_ms: float | None = None

    def __str__(self) -> str:
        cpu = f", {self.cpu_ms:.3f} ms of processor an image" if self.cpu_ms else ""
        return f"{self.rate:,.0f} images/s{cpu}"


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, work="archives, which are kept, and outputs", rounds=5)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--peers-python", default=sys.executable, metavar="PATH", help="interpreter with bench-peers")
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    parts = args.parts.split(",")
    machine = describe_machine("pillow", "simplejpeg", "torch", "ray", "webdataset", "numpy")
    args.work.mkdir(parents=True, exist_ok=True)
    archives = write_archives(args.work, args.images)
    found = take_turns(make_cases(args, archives, parts), args.rounds, show=str)
    rows = {name: summary(measured) for name, measured in found.items()}
    result = {"bytes_per_image": mean_size(archives), "images_per_s": rows, "ratios": ratios(rows)}
    if "peers" in parts:
        folder = extracted(args.work, min(args.images, UNIQUE))
        result["other makers"] = other_makers(args.work, folder, args.rounds, args.peers_python)
    if "memory" in parts:
        result["worker_peak_mib"] = memory(args.work)
    if "plan" in parts:
        result["planning"] = planning(args.work)
    for name, value in result["ratios"].items():
        print(f"{name:44} {value:.3f}")
    write_results(args.results, machine, result)


def make_cases(args: argparse.Namespace, archives: Path, parts: list[str]) -> dict[str, Callable[[], Measured]]:
    """What takes turns."""
    cases: dict[str, Callable[[], Measured]] = {}
    if "floor" in parts:
        images = unique_images(args.work)[:300]
        cases["floor, 1 process"] = functools.partial(floor, images, 1)
        cases["floor, 2 processes"] = functools.partial(floor, images, 2)
    if "prepare" in parts:
        for workers in worker_counts():
            cases[f"prepare, {workers} worker(s)"] = functools.partial(prepare, args.work, archives, workers)
    if "peers" in parts:
        folder = extracted(args.work, min(args.images, UNIQUE))
        cases["webdataset ShardWriter + Pillow, 1 process"] = lambda: Measured(shard_writer(args.work, folder))
        cases["Ray Data write_webdataset + Pillow, 2 cores"] = lambda: Measured(ray_data(args.work, folder))
    return cases


def worker_counts() -> list[int]:
    """1, 2, 4, ... and all cores; at least 1 and 2."""
    return sorted({1, 2, CORES} | {2**power for power in range(CORES.bit_length()) if 2**power <= CORES})


def other_makers(work: Path, folder: Path, rounds: int, python: str) -> dict[str, Any]:
    """What :mod:`peers` makes of the same files, once a round; or why not."""
    found: dict[str, Any] = {}
    for name in peers.MAKERS:
        rows = []
        for _ in range(rounds):
            shutil.rmtree(work / "peer", ignore_errors=True)
            rows.append(peers.ask(name, folder, work / "peer", python=python))
            print(f"{name}: {rows[-1]}", flush=True)
            if "skipped" in rows[-1]:
                break
        skipped = "skipped" in rows[-1]
        found[name] = rows[-1] if skipped else spread([row["rate"] for row in rows]) | {"version": rows[0]["version"]}
    return found


def summary(rows: list[Measured]) -> dict[str, Any]:
    """Median and range of the rates; median of the processor times."""
    cpu = [row.cpu_ms for row in rows if row.cpu_ms]
    times = {"cpu_ms_per_image": round(statistics.median(cpu), 4), "all_cpu_ms": cpu} if cpu else {}
    return spread([row.rate for row in rows]) | times


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures the project promises something about."""
    names = {
        "prepare / floor, 1 core": ("prepare, 1 worker(s)", "floor, 1 process"),
        "prepare / floor, 2 cores": ("prepare, 2 worker(s)", "floor, 2 processes"),
        "prepare 1 worker / ShardWriter + Pillow": (
            "prepare, 1 worker(s)",
            "webdataset ShardWriter + Pillow, 1 process",
        ),
        "prepare 2 workers / Ray Data": ("prepare, 2 worker(s)", "Ray Data write_webdataset + Pillow, 2 cores"),
    }
    names |= {
        f"prepare, {workers} workers / 1": (f"prepare, {workers} worker(s)", "prepare, 1 worker(s)")
        for workers in worker_counts()[1:]
    }
    present = {name: pair for name, pair in names.items() if rows.keys() >= set(pair)}
    found = {name: round(rows[top]["median"] / rows[bottom]["median"], 3) for name, (top, bottom) in present.items()}
    key = "cpu_ms_per_image"
    for name, (top, bottom) in present.items():
        if key in rows[top] and key in rows[bottom] and "floor" in name:
            found[f"{name}, by processor time"] = round(rows[bottom][key] / rows[top][key], 3)
    return found


def mean_size(archives: Path) -> int:
    """Mean bytes of a source image, headers included."""
    count = int(archives.name.rsplit("-", 1)[1])
    return (archives / "ILSVRC2012_img_train.tar").stat().st_size // count


def floor(images: list[bytes], processes: int) -> Measured:
    """decode + encode by libjpeg-turbo in some processes at once."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(codec_rate, [(images[:20], 0.5)] * processes)  # warm-up
        rows = pool.map(codec_rate, [(images, FLOOR_S)] * processes, chunksize=1)
    return Measured(sum(rate for rate, _ in rows), statistics.mean(cpu_ms for _, cpu_ms in rows))


def codec_rate(task: tuple[list[bytes], float]) -> tuple[float, float]:
    """Images/s and processor time an image in ms of one process."""
    images, seconds = task
    stored = [stored_pixels(data) for data in images]
    start_s, start_cpu_s, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start_s < seconds:
        for data, pixels in zip(images, stored, strict=True):
            simplejpeg.decode_jpeg(data)
            simplejpeg.encode_jpeg(pixels, quality=STORED_QUALITY, colorsubsampling="420")
        count += len(images)
    return count / (time.perf_counter() - start_s), 1000 * (time.process_time() - start_cpu_s) / count


def stored_pixels(data: bytes) -> np.ndarray:
    """What prepare encodes, made beforehand."""
    image = Image.open(io.BytesIO(data))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(image.resize((256, 256), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def prepare(work: Path, archives: Path, workers: int, probe: Callable[[], None] | None = None) -> Measured:
    """Our command between the first and the last finished shard, and its workers' processor time over the same span."""
    output = work / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "prepare", "--source", "imagenet", "--input", archives]
    command += ["--output", output, "--workers", workers, "--shard-size", SHARD_SIZE, "--quality", STORED_QUALITY]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    times: list[float] = []
    seen = [(0, workers_cpu_s())]  # shards finished, processor seconds of each process of Ray's
    while process.poll() is None:
        times = max(times, finished(output), key=len)  # the last look may meet a folder that is half removed
        if len(times) > seen[-1][0]:
            seen.append((len(times), workers_cpu_s()))
        if probe:
            probe()
        time.sleep(0.05)
    stdout, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"prepare failed: {stderr}")
    print("   ", re.findall(r"prepared .*", stdout)[0], flush=True)
    return Measured(finished_rate(times, workers), cpu_ms_per_image(seen, workers))


def cpu_ms_per_image(seen: list[tuple[int, dict[str, float]]], workers: int) -> float | None:
    """Processor time of the busiest processes since every worker had finished a shard; None for too few shards."""
    seen = [row for row in seen if row[0] >= workers]
    if len(seen) < 2:
        return None
    (first, before), (last, after) = seen[0], seen[-1]
    used = sorted(after[pid] - before.get(pid, 0.0) for pid in after)
    return 1000 * sum(used[-workers:]) / (SHARD_SIZE * (last - first))


def finished(output: Path) -> list[float]:
    """When each shard was finished, by the times of their records, sorted."""
    try:
        return sorted(path.stat().st_mtime for path in (output / ".work" / "records").glob("*.json"))
    except FileNotFoundError:
        return []  # the work folder was just removed


def finished_rate(times: list[float], workers: int) -> float:
    """Images/s from when every worker has finished its first shard to the last shard."""
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
    """Shorter side to 256, center, JPEG: as most scripts do it."""
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
        peaks[f"{count:,} images"] = seen[-1]
        if count != 1000:
            shutil.rmtree(archives)
    return peaks


def worker_peak_mib() -> float:
    """The largest VmHWM of the Ray workers that run build_shard now."""
    peaks = [re.search(r"VmHWM:\s+(\d+) kB", text) for text in of_workers("status", b"ray::build_shard").values()]
    return max((int(peak.group(1)) / 1024 for peak in peaks if peak), default=0.0)


def workers_cpu_s() -> dict[str, float]:
    """Processor seconds, of user and system, that each Ray worker has used; between two shards it is called idle."""
    fields = {pid: text.rpartition(")")[2].split() for pid, text in of_workers("stat", b"ray::").items()}
    return {pid: (int(row[11]) + int(row[12])) / os.sysconf("SC_CLK_TCK") for pid, row in fields.items()}


def of_workers(name: str, title: bytes) -> dict[str, str]:
    """One file of /proc of every Ray worker of this title, by process id."""
    texts = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cmdline").read_bytes().startswith(title):
                texts[path.name] = (path / name).read_text()
        except OSError:
            continue  # it has just ended
    return texts


PLAN_SCRIPT = """
import re, sys, time
from pathlib import Path
from pipeline.config import PrepareOptions
from pipeline.preparation.plan import make_plan
from pipeline.sources import open_source
start_s = time.perf_counter()
options = PrepareOptions(source="imagenet", output=Path("out"), input=Path(sys.argv[1]))
listing = open_source(options).listing()
digest = listing.digest()
plan = make_plan(listing, options)
status = Path("/proc/self/status").read_text()  # ru_maxrss would be at least the benchmark's own
peak = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024
print(len(listing.splits["train"]), len(plan), time.perf_counter() - start_s, peak)
"""


def planning(work: Path) -> dict[str, float]:
    """Lists, hashes and plans an archive of ImageNet's size whose images are 100 bytes."""
    folder = work / "headers"
    if not folder.exists():
        write_headers(folder)
    done = subprocess.run(
        [sys.executable, "-c", PLAN_SCRIPT, folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    entries, shards, seconds, peak = done.stdout.split()
    return {"entries": int(entries), "shards": int(shards), "seconds": float(seconds), "peak_mib": float(peak)}


if __name__ == "__main__":
    main()
