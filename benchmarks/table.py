"""Prints what the newest results say, as one table: ours beside the peer or the floor, and the file it stands in.

python benchmarks/table.py            what `make bench` ends with
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Row = tuple[str, str]


def loader(table: dict[str, Any]) -> Iterator[Row]:
    """Rates and ratios of the loader."""
    yield "loader, the paper's recipe, JPEG shards", f"{table['images_per_s']['whole']['median']:,.0f} images/s"
    names = {
        "whole / bare (wanted 0.95)": "loader over a bare DALI pipeline (wanted 0.95)",
        "whole / webdataset-paper (wanted 4)": "loader over webdataset + Pillow, the same work (wanted 4)",
        "whole-raw / whole (wanted 4)": "raw shards over JPEG shards (wanted 4)",
        "two-split / two-each": "feed = split over each, both towers on one CPU",
    }
    for key, name in names.items():
        yield name, f"{table['ratios'][key]:.2f}"


def trainer(table: dict[str, Any]) -> Iterator[Row]:
    """Steps of the net beside plain torch modules."""
    for name, row in table["summary"].items():
        if name in table.get("note", "").partition(":")[0].split(", "):  # measured again: the note says where
            continue
        times = f", {row['times_plain']:.2f} times plain torch" if row["times_plain"] else ""
        yield f"training step, {name}, batch {table['batch']}", f"{row['images_per_s']:,.1f} images/s{times}"


def overlap(table: dict[str, Any]) -> Iterator[Row]:
    """Computing while halves cross, beside waiting for them."""
    for name, row in table["summary"].items():
        if "together" in name or "again" in name:
            yield f"two towers, {name} (over: in turns), time of a step", f"{row['of in turns']:.3f}"


def stages(table: dict[str, Any]) -> Iterator[Row]:
    """Predicted and measured rates, and the cost of metrics."""
    for name, case in table["cases"].items():
        share = case["measured / predicted (wanted 0.9..1.1)"]
        least = case["end to end / min(loader, synthetic)"]
        yield f"stages add up: {name} (wanted 0.9..1.1)", f"{share:.2f} of predicted; limit: {case['limit']}"
        yield f"end to end over min(loader, synthetic): {name}", f"{least:.2f}"
    yield "training with metrics over without (wanted 0.98)", f"{table['metrics']['with / without (wanted 0.98)']:.3f}"


def prepare(table: dict[str, Any]) -> Iterator[Row]:
    """Ratios of prepare."""
    yield from ((f"prepare: {name}", _text(value)) for name, value in table["ratios"].items())


def cluster(table: dict[str, Any]) -> Iterator[Row]:
    """What the way through a Ray job costs."""
    wait = table["submit to first log line, s"]["median"]
    yield "prepare as a Ray job over prepare directly", _text(table["cluster / direct, images/s"]["of medians"])
    yield "submit to the first line of the log", f"{wait:.2f} s"


def fashion(table: dict[str, Any]) -> Iterator[Row]:
    """Accuracy by seed."""
    seeds = ", ".join(f"{run['top1']:.4f}" for run in table["runs"])
    most = table["minutes"]["max"]
    yield "Fashion-MNIST, top-1 of the test pictures by seed (wanted 0.92)", f"{seeds}; at most {most:.0f} min"


def demo(table: dict[str, Any]) -> Iterator[Row]:
    """The demo."""
    yield "make demo", f"top-1 {table['result']['top1']:.3f}, {table['make_demo_wall_s']:.0f} s"


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else json.dumps(value)


KINDS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "prepare": prepare, "loader": loader, "trainer": trainer, "trainer-norm": trainer, "overlap": overlap,
    "stages": stages, "cluster": cluster, "fashion": fashion,
    "fashion-kernels": fashion, "demo": demo
}  # fmt: skip


def rows() -> Iterator[tuple[str, str, str]]:
    """What, figure and file; of every kind the newest file of each hardware."""
    newest = {path.stem.split("_", 1)[1]: path for path in sorted(RESULTS.glob("*.json"))}
    for name, path in newest.items():
        kind = name.split("_", 1)[1]
        if kind not in KINDS:
            yield f"{kind}", "see the file", path.name
            continue
        for what, figure in KINDS[kind](json.loads(path.read_text())):
            yield what, figure, path.name


def main() -> None:
    """Prints a Markdown table."""
    print("| what | figure | file in `benchmarks/results/` |\n|---|---|---|")
    for what, figure, name in rows():
        print(f"| {what} | {figure} | `{name}` |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
