"""What does a set of ImageNet's size cost one process: opened, a step, resumed late in an epoch, evaluated?

    python benchmarks/large_set.py --work DIR          626 shards of 2,000, 1.25 million samples; 3 min, 2.9 GB of disk

As one process, and as one of 64 replicas, 128 rows of each batch. Images are 8x8 raw pixels: what is measured is the
opening and the reading, not the decoding. Times are of one try; memory is what no file stands behind. The results go to
benchmarks/results/DATE_MACHINE_large_set.json.
"""

import resource
import time
from pathlib import Path
from typing import Any

from harness import describe_machine, make_parser, write_results
from tiny_sets import SHARD_SIZE, write_tiny_set

ROWS, SIDE_PX = 128, 8
STEPS = 100
SHARDS = 626


def open_loader(folder: Path, replicas: int, state: dict[str, Any] | None = None) -> Any:
    """The last of some replicas."""
    from pipeline.loader.batch import BatchShare
    from pipeline.loader.batches import TrainingLoader
    from pipeline.loader.config import LoaderConfig

    config = LoaderConfig(crop_px=SIDE_PX, mean="channel", threads=1)
    share = BatchShare(replicas - 1, replicas)
    return TrainingLoader(folder, config, batch_size=ROWS * replicas, seed=1, share=share, state=state)


def memory_mb() -> float:
    """Memory of this process that no file stands behind, MB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


def training(folder: Path, replicas: int) -> dict[str, float]:
    """Opened, some steps, resumed three steps before an epoch's end: s, ms, MB."""
    before_mb, begin = memory_mb(), time.perf_counter()
    loader = open_loader(folder, replicas)
    loader.next()
    found = {"opened_s": time.perf_counter() - begin, "memory_mb": memory_mb() - before_mb}
    begin = time.perf_counter()
    for _ in range(STEPS):
        loader.next()
    found["step_ms"] = 1e3 * (time.perf_counter() - begin) / STEPS
    late = loader.state() | {"epoch": 5, "position": loader.steps_per_epoch - 3}
    loader.close()
    begin = time.perf_counter()
    loader = open_loader(folder, replicas, late)
    loader.next()
    found["resumed_late_s"] = time.perf_counter() - begin
    loader.close()
    return found


def evaluation(folder: Path) -> dict[str, float]:
    """All samples once, in stored order: s."""
    from pipeline.loader.batches import EvaluationLoader
    from pipeline.loader.config import LoaderConfig

    config = LoaderConfig(crop_px=SIDE_PX, mean="channel", threads=1)
    before_mb, begin = memory_mb(), time.perf_counter()
    loader = EvaluationLoader(folder, config, batch_size=ROWS, split="train")
    count = sum(len(batch.keys) for batch in loader)
    return {"s": time.perf_counter() - begin, "samples": count, "memory_mb": memory_mb() - before_mb}


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, work="the data set, which is kept")
    parser.add_argument("--shards", type=int, default=SHARDS)
    arguments = parser.parse_args()
    machine, samples = describe_machine("numpy", "torch"), arguments.shards * SHARD_SIZE
    folder = arguments.work / f"tiny-{samples}"
    if not (folder / "manifest.json").exists():
        write_tiny_set(folder, samples)
    warm = open_loader(folder, 64)  # imports, and what DALI keeps
    warm.next()
    warm.close()
    result: dict[str, Any] = {"samples": samples, "shards": arguments.shards}
    for replicas in (64, 1):
        result[f"one of {replicas}"] = training(folder, replicas)
        print(replicas, result[f"one of {replicas}"], flush=True)
    result["evaluation"] = evaluation(folder)
    result["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # mapped files too
    print(result["evaluation"], f"peak {result['peak_memory_mb']:,.0f} MB with what is mapped")
    write_results(arguments.results, machine, result)


if __name__ == "__main__":
    main()
