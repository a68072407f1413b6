"""Prints what the newest results say, as one table: ours beside the peer or the floor, and the file it stands in.

python benchmarks/summary_table.py            what `make bench` ends with
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS

Row = tuple[str, str]
# Results of before the scripts had their names of today; their keys held targets, their ratios were single figures.
OLD_NAMES = {
    "prepare": "prepare_speed", "loader": "loader_speed", "trainer": "step_speed", "trainer-norm": "step_speed-norm",
    "stages": "end_to_end", "cluster": "job_overhead", "fashion": "fashion_mnist",
    "fashion-kernels": "fashion_mnist-kernels",
}  # fmt: skip


def middle(value: Any) -> float:
    """The median of a spread, or the figure itself."""
    return value.get("median", value.get("of medians")) if isinstance(value, dict) else value


def loader_speed(table: dict[str, Any]) -> Iterator[Row]:
    """Rates and ratios of the loader."""
    yield "loader, the paper's recipe, JPEG shards", f"{middle(table['images_per_s']['whole']):,.0f} images/s"
    names = {
        "whole / bare": "loader over a bare DALI pipeline",
        "whole / webdataset-paper": "loader over webdataset + Pillow, the same work",
        "whole-raw / whole": "raw shards over JPEG shards",
        "two-split / two-each": "feed = split over each, both towers on one CPU",
    }
    for key, name in names.items():
        yield name, f"{middle(table['ratios'][key]):.2f}"


def step_speed(table: dict[str, Any]) -> Iterator[Row]:
    """Steps of the net beside plain torch modules."""
    for name, row in table["summary"].items():
        if name in table.get("note", "").partition(":")[0].split(", "):  # measured again: the note says where
            continue
        times = f", {middle(row['times_plain']):.2f} times plain torch" if row["times_plain"] else ""
        yield f"training step, {name}, batch {table['batch']}", f"{middle(row['images_per_s']):,.1f} images/s{times}"


def overlap(table: dict[str, Any]) -> Iterator[Row]:
    """Computing while halves cross, beside waiting for them."""
    for name, row in table["summary"].items():
        if "together" in name or "again" in name:
            yield f"two towers, {name} (over: in turns), time of a step", f"{middle(row['of in turns']):.3f}"


def end_to_end(table: dict[str, Any]) -> Iterator[Row]:
    """Predicted and measured rates, and the cost of metrics."""
    for name, case in table["cases"].items():
        share, least = middle(case["measured / predicted"]), middle(case["end to end / min(loader, synthetic)"])
        yield f"stages add up: {name}", f"{share:.2f} of predicted; limit: {case['limit']}"
        yield f"end to end over min(loader, synthetic): {name}", f"{least:.2f}"
    yield "training with metrics over without", f"{middle(table['metrics']['with / without']):.3f}"


def prepare_speed(table: dict[str, Any]) -> Iterator[Row]:
    """Ratios of prepare."""
    yield from ((f"prepare: {name}", f"{middle(value):.3g}") for name, value in table["ratios"].items())


def job_overhead(table: dict[str, Any]) -> Iterator[Row]:
    """What the way through a Ray job costs."""
    yield "prepare as a Ray job over prepare directly", f"{middle(table['cluster / direct, images/s']):.3g}"
    yield "submit to the first line of the log", f"{middle(table['submit to first log line, s']):.2f} s"


def fashion_mnist(table: dict[str, Any]) -> Iterator[Row]:
    """Accuracy by seed."""
    seeds = ", ".join(f"{run['top1']:.4f}" for run in table["runs"])
    yield "Fashion-MNIST, top-1 of the test images by seed", f"{seeds}; at most {table['minutes']['max']:.0f} min"


def scale(table: dict[str, Any]) -> Iterator[Row]:
    """Exponents of growth."""
    for row in table["rows"]:
        exponent = "not known" if row["exponent"] is None else f"{row['exponent']:.2f}"
        yield f"{row['name']}, {row['unit']}: exponent over {row['grows']}", exponent


def demo(table: dict[str, Any]) -> Iterator[Row]:
    """The demo."""
    yield "make demo", f"top-1 {table['result']['top1']:.3f}, {table['make_demo_wall_s']:.0f} s"


SCRIPTS: tuple[Callable[[dict[str, Any]], Iterator[Row]], ...] = (
    prepare_speed, loader_speed, step_speed, overlap, end_to_end, job_overhead, fashion_mnist, scale, demo
)  # fmt: skip


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    """What, figure and file; of every script the newest file of each machine."""
    kinds = {kind.__name__: kind for kind in SCRIPTS}
    newest = {}
    for path in sorted(folder.glob("*.json")):
        _, machine, name = path.stem.split("_", 2)
        newest[machine, OLD_NAMES.get(name, name)] = path
    for (_, name), path in newest.items():
        kind = kinds.get(name.partition("-")[0])
        if kind is None:
            yield name, "see the file", path.name
            continue
        text = re.sub(r' \(wanted [^")]*\)"', '"', path.read_text(encoding="utf-8"))
        for what, figure in kind(json.loads(text)):
            yield what, figure, path.name


def main() -> None:
    """Prints a Markdown table."""
    print("| what | figure | file in `benchmarks/results/` |\n|---|---|---|")
    for what, figure, name in rows(RESULTS):
        print(f"| {what} | {figure} | `{name}` |", flush=True)


if __name__ == "__main__":
    main()
