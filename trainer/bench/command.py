"""What ``python -m trainer bench`` does with its options."""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

from trainer.bench.record import BenchRecord, read_record, to_json, write_record
from trainer.config import Config
from trainer.errors import BenchError


def run(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Config]) -> int:
    """Measures, or compares, or projects an old result; status 0."""
    _check(arguments)
    if arguments.compare:
        return _compare(*arguments.compare)
    if arguments.read and len(arguments.read) > 1:
        return _gather([read_record(path) for path in arguments.read], arguments)
    record = read_record(arguments.read[0]) if arguments.read else _measure(arguments, load(arguments))
    _conclude(record, arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses options that contradict each other, before anything is measured."""
    if arguments.compare and (arguments.read or arguments.json or arguments.html or arguments.project is not None):
        raise BenchError("--compare prints a table and nothing else: leave --read, --json, --html and --project out")
    _check_project(arguments)
    _check_outputs(arguments)
    if arguments.compare or arguments.read:
        if arguments.data or arguments.synthetic:
            raise BenchError("--compare and --read look at old results: leave --data and --synthetic out")
        return
    if bool(arguments.data) == arguments.synthetic:
        raise BenchError("expected --data DIR for a prepared data set, or --synthetic for none, and not both")
    if arguments.seconds <= 0:
        raise BenchError(f"--seconds is {arguments.seconds:g}: expected more than 0")


def _check_project(arguments: argparse.Namespace) -> None:
    """What the model can count with."""
    most = arguments.project
    if most is not None and (most < 1 or (most > 2 and most % 2)):
        raise BenchError(f"--project is {most}: expected 1, or an even number (a tower is a process)")
    for name, link in (("--tower-link", arguments.tower_link), ("--replica-link", arguments.replica_link)):
        if link is not None and most is None:
            raise BenchError(f"{name} belongs to --project N: give both, or neither")
        if link is not None and not link > 0:
            raise BenchError(f"{name} is {link:g}: expected more than 0")


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Whether the files can be written at the end."""
    for path in (arguments.json, arguments.html):
        if path and not path.parent.is_dir():
            raise BenchError(f"{path} cannot be written: there is no folder {path.parent}")


def _measure(arguments: argparse.Namespace, config: Config) -> BenchRecord:
    """Runs the benchmark."""
    from trainer.bench import run as bench

    recipe = (arguments.config or Path("paper.toml")).name
    if arguments.data:
        from pipeline.manifest import read_manifest
        from trainer.training.run_folder import check_fits

        check_fits(config, read_manifest(arguments.data), arguments.data)
    if config.model.towers == 1 and arguments.processes == 2:
        raise BenchError("model.towers = 1: a net of one tower runs in one process; leave --processes 2 out")
    options = bench.BenchOptions(arguments.data, arguments.seconds, tuple(arguments.batch_sizes))
    most = arguments.project or 0
    scaling = tuple(count for count in (1, 2, 4) if count <= most) if config.model.towers == 2 else ()
    return bench.run_bench(
        config,
        options,
        recipe=recipe + (f" ({', '.join(arguments.set)})" if arguments.set else ""),
        processes=arguments.processes,
        device=arguments.device,
        scaling=scaling,
        say=bench.print_line,
    )


def _conclude(record: BenchRecord, arguments: argparse.Namespace) -> None:
    """Prints, and writes the files that were asked for."""
    from trainer.bench.bottleneck import judge
    from trainer.bench.prediction import Projection, links_of, predict_rate, project
    from trainer.bench.text import print_record

    verdict = judge(record)
    projections: list[Projection] = []
    if arguments.project:
        links = links_of(record, tower_gb_per_s=arguments.tower_link, replica_gb_per_s=arguments.replica_link)
        counts = [1, *range(2, arguments.project + 1, 2)]
        counts = [count for count in counts if count <= 8 or count & (count - 1) == 0 or count == arguments.project]
        projections = [project(record, count, links) for count in counts]
    print_record(record, verdict, projections)
    concluded = {
        "predicted_images_per_s": predict_rate(record),
        "verdict": dataclasses.asdict(verdict),
        "projections": [dataclasses.asdict(row) for row in projections],
    }
    if arguments.json:
        write_record(named_for_node(arguments.json), to_json(record, **concluded))
    if arguments.html:
        from trainer.bench.page import render

        write_record(named_for_node(arguments.html), render(record, verdict, projections))
        print(named_for_node(arguments.html))


def named_for_node(path: Path) -> Path:
    """The path with ``{node}`` in its name replaced by this node's name, so that nodes write a file each."""
    return path.with_name(path.name.replace("{node}", os.environ.get("TWOTOWER_NODE") or os.uname().nodename))


def _gather(records: list[BenchRecord], arguments: argparse.Namespace) -> int:
    """One result for all nodes: prints a line a node, and writes them together."""
    from trainer.bench.text import node_rows, print_nodes

    if arguments.html or arguments.project:
        raise BenchError("--html and --project are about one result: give --read one file")
    rows = node_rows(records)
    print_nodes(rows)
    if arguments.json:
        together = {"nodes": [dataclasses.asdict(row) for row in rows]}
        write_record(arguments.json, json.dumps(together, indent=1) + "\n")
    return 0


def _compare(first: Path, second: Path) -> int:
    """Prints two results side by side."""
    from trainer.bench.compare import compare, differing_settings
    from trainer.bench.text import print_comparison

    a, b = read_record(first), read_record(second)
    print(f"a: {first}, b: {second}")
    print_comparison(compare(a, b), differing_settings(a, b))
    return 0
