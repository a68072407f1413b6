"""``python -m trainer experiment one-weird-trick``: starts the processes, compares what they did with one process.

It trains no runs: updates are compared with those of one process for each seed, bytes are counted, and steps are timed.
Of the common options it has those about recipe, data set, folder, seeds, cores and device.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.loader.staging import is_url
from pipeline.manifest import read_manifest, write_atomic
from trainer.config import Config, load_config, to_toml
from trainer.errors import RecipeError, RunError, TrainerError
from trainer.experiments import folder as folders
from trainer.experiments import rows
from trainer.experiments.ablations import CONFIGS
from trainer.experiments.folder import Record, Row
from trainer.experiments.measures import first_crops
from trainer.experiments.one_weird_trick import page
from trainer.experiments.one_weird_trick.found import (
    CLAIMED,
    TITLES,
    WORLDS,
    Found,
    Speed,
    Traffic,
    bytes_key,
    count_traffic,
    difference_words,
    is_equal,
    read_speed,
)
from trainer.experiments.one_weird_trick.layouts import Layouts, make_layouts
from trainer.experiments.one_weird_trick.worker import DTYPES, PART_NAME, Job, train, write_job
from trainer.experiments.options import ONE_WEIRD_TRICK
from trainer.parallel.launch import choose_device, run_towers
from trainer.parallel.weird_trick import WORKERS, worker_share
from trainer.planning.describe import to_dict
from trainer.training import fit
from trainer.training.metrics import describe_environment
from trainer.training.run_folder import check_replicas
from twotower import verbosity
from twotower.addresses import masked
from twotower.terminal import print_error
from twotower.words import pluralize

NOT_EQUAL = 3  # exit status: some processes failed, or did something else than one process does
BATCH_SIZE, UPDATES = 16, 5  # of the comparison: 4 images a process of 2 x 2
ROUNDS, SLOT_S = 7, 1.0
START_S = 5.0  # of two or four processes that import torch, for an estimate
SPEED_NAME = "speed.json"
MEANINGLESS = {"variants": (), "parallel": 1, "processes": 1, "address": None, "gpus": 0}  # options and their defaults


@dataclasses.dataclass(frozen=True)
class Plan:
    """What nothing speaks against.

    Attributes:
        layouts: both nets.
        seeds: of the comparison; the first also of the timing.
        record: what a second start must have in common.
        data: local data set folder.
        output: the experiment's folder.
        cpus: cores for all processes together.
        device: of the timing, as ``--device`` has it.
    """

    layouts: Layouts
    seeds: range
    record: Record
    data: Path
    output: Path
    cpus: int
    device: str | None


def run(arguments: argparse.Namespace, base: Config) -> int:
    """Checks everything, then makes what is missing, and the page about it."""
    plan = make_plan(arguments, base)
    folders.check_folder(plan.output, plan.record)
    choose_device(plan.device)
    if arguments.dry_run:
        print_estimate(plan)
        return 0
    with folders.hold(plan.output):
        folders.check_folder(plan.output, plan.record)
        folders.begin(plan.output, plan.record, plan.layouts.recipes, rooms=())
        traffic, compared = _traffic(plan), _compare(plan)
        found = Found(plan.layouts, tuple(compared), tuple(traffic), _speed(plan), plan.record, tuple(plan.seeds))
        path = page.write_results(plan.output, found)
    print(path, flush=True)
    return _tell(found)


def make_plan(arguments: argparse.Namespace, base: Config) -> Plan:
    """Refuses whatever can be refused before anything is written.

    Raises:
        TrainerError, PipelineError: an option, the recipe, or one of its nets on this data set.
    """
    for name, default in MEANINGLESS.items():
        if getattr(arguments, name) != default:
            raise RecipeError(
                f"--{name}: {ONE_WEIRD_TRICK} trains no runs, it starts 2 and 4 processes on this machine: leave the "
                "option out"
            )
    manifest = read_manifest(arguments.data)
    base = fit.resolve(base, manifest)
    layouts = make_layouts(base)
    for config in layouts.recipes.values():
        check_replicas(fit.check_fits(config, manifest, arguments.data), WORKERS)
    data = str(arguments.source) if is_url(arguments.source) else str(arguments.data.absolute())
    first = base.train.seed
    return Plan(
        layouts=layouts,
        seeds=range(first, first + arguments.seeds),
        record=Record(ONE_WEIRD_TRICK, to_toml(base), masked(data), manifest.fingerprint),
        data=arguments.data,
        output=arguments.output,
        cpus=arguments.cpus or len(os.sched_getaffinity(0)),
        device=arguments.device,
    )


def print_estimate(plan: Plan) -> None:
    """Says what it would take; a step is measured, as ``train --dry-run`` does."""
    from trainer.planning.dry_run import plan_run

    config = plan.layouts.one_tower
    step_s = plan_run(config, plan.data, device="cpu").step_s
    starts = len(WORLDS) * len(plan.seeds)
    # In float64 a step takes about twice as long; whoever makes it, the work is that of one process with all cores.
    updates = (1 + len(WORLDS)) * len(plan.seeds) * UPDATES * (1 + 2) * BATCH_SIZE / config.train.batch_size
    verbosity.remark(
        f"{ONE_WEIRD_TRICK}: {pluralize(starts, 'comparison')} ({pluralize(len(plan.seeds), 'seed')}, on 2 and on "
        f"2 x 2 processes, {UPDATES} updates of {BATCH_SIZE} images in float64 and in fp32), and {ROUNDS} rounds of "
        "timing",
        stdout=True,
    )
    if step_s is None:
        verbosity.remark("steps were not measured: they do not fit into memory", stdout=True)
        return
    scratch = 2 * (8 + 4) * len(TITLES) * to_dict(config.model)["parameters"]  # gradients and weights, of 2 x 2
    seconds = updates * step_s + 6 * ROUNDS * max(SLOT_S, step_s) + 12 * step_s + START_S * (starts + 1)
    verbosity.remark(
        f"about {seconds / 3600:.2g} hours at {step_s:.3g} s a step of {config.train.batch_size} images with all "
        f"cores, and {START_S:g} s a start of processes; 1 MiB of disk, meanwhile {scratch / 2**30:.2g} GiB in TMPDIR",
        stdout=True,
    )


def _traffic(plan: Plan) -> list[Traffic]:
    """Counts what is sent: of the paper's net, and of this recipe's where that is another."""
    paper = make_layouts(load_config(CONFIGS / "paper.toml"))
    found = count_traffic(paper, "the paper's net")
    return (
        found
        if plan.layouts.towers.model == paper.towers.model
        else found + count_traffic(plan.layouts, "this recipe's net")
    )


def _compare(plan: Plan) -> list[Row]:
    """A row for every seed and number of processes; those that are there and good stay."""
    found = rows.read_rows(plan.output)
    wanted = [(name, seed) for seed in plan.seeds for name in WORLDS]
    for number, (name, seed) in enumerate(wanted):
        row = found.get((name, seed))
        if row and row["status"] == rows.OK and is_equal(row, plan.layouts.one_tower.model):
            continue
        row = compare_once(plan, name, seed)
        found[name, seed] = row
        order = sorted(found.values(), key=lambda row: (list(WORLDS).index(row["variant"]), row["seed"]))
        rows.write_rows(plan.output, order)
        said = f"failed: {row['reason']}" if row["status"] != rows.OK else difference_words(row)
        verbosity.remark(f"comparisons {number + 1}/{len(wanted)}  {TITLES[name]}, seed {seed}: {said}", stdout=True)
    return [found[key] for key in sorted(wanted, key=lambda key: (list(WORLDS).index(key[0]), key[1]))]


def compare_once(plan: Plan, name: str, seed: int) -> Row:
    """Starts the processes and compares; a row, also of what failed."""
    config = plan.layouts.one_tower
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
    row: Row = {"variant": name, "seed": seed, "status": rows.OK, "updates": UPDATES, "batch_size": BATCH_SIZE}
    try:
        images, labels = read_images(plan, UPDATES * BATCH_SIZE)
        job = Job(
            "equality", to_toml(plan.layouts.towers), to_toml(config), BATCH_SIZE, updates=UPDATES, cpus=plan.cpus
        )
        with tempfile.TemporaryDirectory(prefix="twotower-trick-") as scratch:
            parts = _start(Path(scratch), job, images, labels, WORLDS[name])
            for dtype, kind in DTYPES.items():
                serial = train(None, config, images, labels, batch_size=BATCH_SIZE, dtype=kind)
                found = compare(serial, [part[dtype] for part in parts])
                row |= {f"{what}_{dtype}": value for what, value in found.items()}
            row |= {bytes_key(place): num_bytes for place, num_bytes in parts[0]["float32"]["sent"].items()}
    except (TrainerError, OSError) as error:
        return {"variant": name, "seed": seed, "status": rows.FAILED, "exit_code": 2, "reason": str(error)}
    return row


def read_images(plan: Plan, count: int) -> tuple[Tensor, Tensor]:
    """``count`` images of :func:`first_crops`; again from the first where there are fewer."""
    images, labels = first_crops(plan.data, plan.layouts.one_tower, count)
    chosen = torch.arange(count) % len(images)
    return images[chosen], labels[chosen]


def _start(scratch: Path, job: Job, images: Tensor, labels: Tensor, world: int) -> list[Any]:
    """What the processes of a start found, by rank.

    Raises:
        RunError: one of them failed; it has said why.
    """
    status = run_towers(write_job(scratch, job, images, labels), world, device=job.device or "cpu")
    if status:
        raise RunError(f"a process ended with status {status}: see above")
    return [torch.load(scratch / PART_NAME.format(rank), weights_only=True) for rank in range(world)]


def compare(serial: Mapping[str, Any], parts: list[Mapping[str, Any]]) -> dict[str, float]:
    """The greatest differences between one process and several, each as a share of the greatest number of its tensor.

    Args:
        serial: of :func:`train` without a mesh.
        parts: of every rank.

    Returns:
        ``loss`` (of all updates), ``gradients`` (of the first), ``weights`` (after the last).
    """
    pairs = parts[::2]
    losses = torch.tensor([part["losses"] for part in pairs], dtype=torch.float64).mean(dim=0)
    found = {"loss": relative_difference(losses, torch.tensor(serial["losses"], dtype=torch.float64))}
    for what in ("gradients", "weights"):
        differences = []
        for rank, part in enumerate(parts):
            share = worker_share(serial[what], "ab"[rank % 2])
            assert share.keys() == part[what].keys()
            differences += [relative_difference(part[what][name], tensor) for name, tensor in share.items()]
        found[what] = max(differences)
    return found


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The greatest difference of two tensors, as a share of the greatest number expected (where that is not zero).

    Raises:
        RunError: a number is not finite, so that there is nothing to compare.
    """
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not math.isfinite(difference):
        raise RunError("a loss, gradient or weight is not finite: set a lower optimizer.learning_rate")
    return difference / (scale or 1.0)


def _speed(plan: Plan) -> Speed | None:
    """Times the layouts, or takes the times that are there; None where it failed."""
    path = plan.output / SPEED_NAME
    wanted = {"cpus": plan.cpus, "rounds": ROUNDS, "batch_size": plan.layouts.towers.train.batch_size}
    before = read_speed(path)
    if before and {name: getattr(before, name) for name in wanted} == wanted:
        return before
    verbosity.remark(f"timing the layouts, {ROUNDS} rounds", stdout=True)
    towers, one_tower = (to_toml(config) for config in plan.layouts.recipes.values())
    job = Job(
        "speed",
        towers,
        one_tower,
        wanted["batch_size"],
        device=plan.device,
        cpus=plan.cpus,
        rounds=ROUNDS,
        slot_s=SLOT_S,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="twotower-trick-") as scratch:
            rates = _start(Path(scratch), job, *read_images(plan, job.batch_size), 2)[0]
    except (TrainerError, OSError) as error:
        print_error(f"the timing failed: {error}")
        return None
    environment = describe_environment(sys.argv)
    machine = {name: str(environment[name]) for name in ("processor", "cores", "commit", "python", "torch")}
    speed = Speed(**wanted, device=choose_device(plan.device), rates=rates, machine=machine)
    try:
        write_atomic(path, (json.dumps(dataclasses.asdict(speed), indent=1) + "\n").encode())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None
    return speed


def _tell(found: Found) -> int:
    """Says what failed or is not equal; the exit status."""
    for row in found.failed:
        print_error(f"{TITLES[row['variant']]}, seed {row['seed']}: {row['reason']}")
    for row in found.unequal:
        print_error(
            f"{TITLES[row['variant']]}, seed {row['seed']} is not one process: {difference_words(row)}, expected less "
            f"than {CLAIMED:g} and the bytes of the formula"
        )
    if found.failed or found.speed is None:
        print("what failed is in no figure; the same command tries again", file=sys.stderr)
    return NOT_EQUAL if found.failed or found.unequal or found.speed is None else 0
