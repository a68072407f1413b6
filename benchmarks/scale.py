"""What grows, and how fast? All that could grow with replicas, classes, steps, samples or jobs, at three sizes each.

    python benchmarks/scale.py                                  about 10 minutes on 2 cores, 2 GB of disk
    python benchmarks/scale.py --only status dropout            some of them
    python benchmarks/scale.py --tree ../before --suffix=-before   the same rows of another checkout

A row has the figures, and the exponent k of ``figure ~ size ** k``. Images are tiny: what is measured is the growth,
not the codec. Each measurement is a process of its own (``growth.py``); an operation that another checkout does not
have is said so. The results go to benchmarks/results/DATE_MACHINE_scale.json.
"""

import argparse
import json
import math
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from growth import Operation, fit_exponent, markdown, measure_apart, silenced
from harness import ROOT, describe_machine, make_parser, write_results

MOST_BYTES = 12 << 30  # of memory, a measurement
TOLERANCE = 0.15  # of an exponent: what noise and caches make of a straight line


def operations() -> list[Operation]:
    """All rows; each module measures what is in its name."""
    import scale_cluster
    import scale_data
    import scale_training

    return [*scale_data.OPERATIONS, *scale_training.OPERATIONS, *scale_cluster.OPERATIONS]


def measure_row(operation: Operation, tree: Path) -> dict[str, Any]:
    """An operation at all its sizes."""
    figures: list[float | str] = []
    for size in operation.sizes:
        work = Path(tempfile.mkdtemp(prefix="scale-"))
        begin = time.perf_counter()
        try:
            figures.append(measure_apart(Path(__file__).resolve(), operation, size, work, tree))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        took = time.perf_counter() - begin
        print(
            f"{operation.name}: {size:,} {operation.grows}: {figures[-1]} {operation.unit} ({took:.1f} s)", flush=True
        )
    numbers = [figure for figure in figures if isinstance(figure, float)]
    exponent = fit_exponent(operation.sizes, numbers) if len(numbers) == len(figures) else math.nan
    known = not math.isnan(exponent)
    return {
        "name": operation.name,
        "grows": operation.grows,
        "unit": operation.unit,
        "sizes": list(operation.sizes),
        "figures": figures,
        "exponent": exponent if known else None,
        "most": operation.most,
        "over": known and exponent > operation.most + TOLERANCE,
        "before": operation.before,
    }


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="operations with one of these words")
    parser.add_argument("--tree", type=Path, default=ROOT, metavar="DIR", help="checkout that is measured (this one)")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="of the results file's name, such as -before")
    parser.add_argument("--list", action="store_true", help="only print the operations")
    for hidden in ("--one", "--size", "--work"):  # how it measures in a process of its own
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.tree.resolve()))
    if arguments.one:
        (operation,) = (each for each in operations() if each.name == arguments.one)
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))  # what explodes fails, and nothing else does
        with silenced():
            figure = operation.measure(Path(arguments.work), int(arguments.size))
        print(json.dumps(figure))
        return
    chosen = [each for each in operations() if not arguments.only or any(word in each.name for word in arguments.only)]
    if arguments.list:
        for each in chosen:
            print(f"{each.name}: {', '.join(map(str, each.sizes))} {each.grows}, {each.unit}")
        return
    machine = describe_machine("torch", "numpy", "ray")
    rows = [measure_row(operation, arguments.tree.resolve()) for operation in chosen]
    print(markdown(rows))
    write_results(arguments.results, machine, {"rows": rows}, arguments.suffix)


if __name__ == "__main__":
    main()
