"""What ``python -m trainer bench`` does with its options. Without torch, so that wrong options are refused at once."""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

from trainer.bench.record import BenchRecord, read_record, to_json, write_record
from trainer.config import Config
from trainer.errors import BenchError
from twotower.verbosity import remark


def run(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Config]) -> int:
    """Measures, or compares, or projects an old result; status 0."""
    _check(arguments)
    if arguments.compare:
        from trainer.bench.text import print_comparison

        a, b = (read_record(path) for path in arguments.compare)
        print("a: {}, b: {}".format(*arguments.compare))
        print_comparison(a, b)
    elif arguments.read and len(arguments.read) > 1:
        _gather([read_record(path) for path in arguments.read], arguments)
    else:
        _conclude(read_record(arguments.read[0]) if arguments.read else _measure(arguments, load(arguments)), arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses options that contradict each other, and files that cannot be written, before anything is measured."""
    most = arguments.project
    if arguments.compare and (arguments.read or arguments.json or arguments.html or most is not None):
        raise BenchError("--compare prints a table and nothing else: leave --read, --json, --html and --project out")
    if arguments.read and len(arguments.read) > 1 and (arguments.html or most is not None):
        raise BenchError("--html and --project are about one result: give --read one file")
    if most is not None and (most < 1 or (most > 2 and most % 2)):
        raise BenchError(f"--project is {most}: expected 1, or an even number (a tower is a process)")
    for name, link in (("--tower-link", arguments.tower_link), ("--replica-link", arguments.replica_link)):
        if link is not None and most is None:
            raise BenchError(f"{name} belongs to --project N: give both, or neither")
        if link is not None and not link > 0:
            raise BenchError(f"{name} is {link:g}: expected more than 0")
    for path in (arguments.json, arguments.html):
        if path and not path.parent.is_dir():
            raise BenchError(f"{path} cannot be written: there is no folder {path.parent}")
    if arguments.compare or arguments.read:
        if arguments.data or arguments.synthetic:
            raise BenchError("--compare and --read look at old results: leave --data and --synthetic out")
    elif bool(arguments.data) == arguments.synthetic:
        raise BenchError("expected --data DIR for a prepared data set, or --synthetic for none, and not both")
    elif arguments.seconds <= 0:
        raise BenchError(f"--seconds is {arguments.seconds:g}: expected more than 0")


def _measure(arguments: argparse.Namespace, config: Config) -> BenchRecord:
    """Runs the benchmark."""
    from trainer.bench.run import BenchSettings, print_line, run_bench
    from trainer.parallel.launch import check_backend, choose_device
    from trainer.precision import resolve_precision, slow_warning
    from trainer.training.fit import check_fits, check_resolved

    if arguments.data:
        from pipeline.manifest import read_manifest

        config = check_fits(config, read_manifest(arguments.data), arguments.data, extend=True)
    check_resolved(config)
    device = choose_device(arguments.device)
    check_backend(arguments.backend, device, arguments.processes)
    config = resolve_precision(config, device)
    if warning := slow_warning(config, device):
        remark(f"warning: {warning}")
    if config.model.towers == 1 and arguments.processes == 2:
        raise BenchError("model.towers = 1: a net of one tower runs in one process; leave --processes 2 out")
    recipe = (arguments.config or Path("paper.toml")).name
    most = arguments.project or 0
    return run_bench(
        config,
        BenchSettings(arguments.data, arguments.seconds, tuple(arguments.batch_sizes)),
        recipe=recipe + (f" ({', '.join(arguments.set)})" if arguments.set else ""),
        processes=arguments.processes,
        device=arguments.device,
        backend=arguments.backend,
        scaling=tuple(count for count in (1, 2, 4) if count <= most) if config.model.towers == 2 else (),
        say=print_line,
    )


def _conclude(record: BenchRecord, arguments: argparse.Namespace) -> None:
    """Prints, and writes the files that were asked for."""
    from trainer.bench.bottleneck import judge
    from trainer.bench.prediction import links_of, predict_rate, project
    from trainer.bench.text import print_record

    found, most = judge(record), arguments.project or 0
    links = links_of(record, tower_gb_per_s=arguments.tower_link, replica_gb_per_s=arguments.replica_link)
    counts = [1, *range(2, most + 1, 2)] if most else []
    counts = [count for count in counts if count <= 8 or count & (count - 1) == 0 or count == most]
    projections = [project(record, count, links) for count in counts]
    print_record(record, found, projections)
    if arguments.json:
        concluded = {
            "predicted_images_per_s": predict_rate(record),
            "bottleneck": dataclasses.asdict(found),
            "projections": [dataclasses.asdict(row) for row in projections],
        }
        write_record(_named_for_node(arguments.json), to_json(record, **concluded))
    if arguments.html:
        from trainer.bench.page import render

        write_record(_named_for_node(arguments.html), render(record, found, projections))


def _named_for_node(path: Path) -> Path:
    """The path with ``{node}`` in its name replaced by this node's name, so that nodes write a file each."""
    return path.with_name(path.name.replace("{node}", os.environ.get("TWOTOWER_NODE") or os.uname().nodename))


def _gather(records: list[BenchRecord], arguments: argparse.Namespace) -> None:
    """One result for all nodes: prints a line for each, and writes them together."""
    from trainer.bench.text import node_rows, print_nodes

    rows = node_rows(records)
    print_nodes(rows)
    if arguments.json:
        together = {"nodes": [dataclasses.asdict(row) for row in rows]}
        write_record(arguments.json, json.dumps(together, indent=1) + "\n")
