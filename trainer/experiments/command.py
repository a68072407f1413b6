"""What ``python -m trainer experiment`` does with its options."""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.loader.staging import is_url
from pipeline.manifest import Manifest, read_manifest
from trainer import stopping
from trainer.config import Config, to_toml
from trainer.errors import RecipeError, TrainerError
from trainer.experiments import folder as folders
from trainer.experiments import measures, rows, runner
from trainer.experiments.catalog import make_experiment
from trainer.experiments.folder import Record, Row, RunTask
from trainer.experiments.options import ONE_WEIRD_TRICK
from trainer.experiments.progress import ExperimentProgress
from trainer.experiments.variants import Experiment
from trainer.training import fit, start
from trainer.training.run_folder import check_replicas
from twotower import verbosity
from twotower.addresses import masked
from twotower.terminal import print_error
from twotower.words import pluralize

DONE_IN_PART = 3  # exit status: some runs failed, or a signal stopped the rest


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment that nothing speaks against.

    Attributes:
        experiment: what is compared.
        tasks: every run of it.
        configs: the recipe of each variant, with the data set's own numbers.
        record: what a second start must have in common.
        data: local data set folder.
        source: the same, or the address that each training fetches it from.
        parallel: runs at once on this machine.
        cpus: cores of a run.
    """

    experiment: Experiment
    tasks: tuple[RunTask, ...]
    configs: dict[str, Config]
    record: Record
    data: Path
    source: str
    parallel: int
    cpus: int


def run(arguments: argparse.Namespace, load_recipe: Callable[[argparse.Namespace], Config]) -> int:
    """Checks everything, then makes what is missing of an experiment, and the page about it."""
    if arguments.name == ONE_WEIRD_TRICK:
        from trainer.experiments.one_weird_trick import command  # imports torch

        return command.run(arguments, load_recipe(arguments))
    plan = make_plan(arguments, load_recipe(arguments))
    folders.check_folder(arguments.output, plan.record)
    for sentence in plan.experiment.left_out:
        verbosity.remark(f"left out: {sentence}")
    from trainer.parallel.launch import choose_device  # imports torch

    device = choose_device(arguments.device)
    if arguments.dry_run:
        from trainer.experiments.estimate import print_estimate

        print_estimate(plan.experiment, plan.tasks, plan.configs, plan.data, device)
        return 0
    if arguments.address:
        runner.check_cluster(arguments.address)
    with folders.hold(arguments.output):
        folders.check_folder(arguments.output, plan.record)
        folders.begin(arguments.output, plan.record, plan.configs)
        return _run(plan, arguments, device)


def make_plan(arguments: argparse.Namespace, base: Config) -> Plan:
    """Refuses whatever can be refused before anything is written.

    Raises:
        TrainerError, PipelineError: an option, the recipe, or a variant of it on this data set.
    """
    manifest = read_manifest(arguments.data)
    base = fit.resolve(base, manifest)
    experiment = make_experiment(arguments.name, base)
    if arguments.variants:
        known = [variant.name for variant in experiment.variants]
        for name in arguments.variants:
            if name not in known:
                raise RecipeError(f"--variants {name}: {arguments.name} has {', '.join(known)} with this recipe")
        experiment = experiment.only(arguments.variants)
    configs = {
        variant.name: _checked(variant.name, variant.recipe(base), manifest, arguments.data)
        for variant in experiment.variants
    }
    seeds = range(base.train.seed, base.train.seed + arguments.seeds)
    tasks = folders.make_tasks(arguments.output, experiment, configs, seeds, arguments.processes)
    cores = len(os.sched_getaffinity(0))
    most = max(task.processes for task in tasks)
    cpus = arguments.cpus or (most if arguments.address else max(1, cores // arguments.parallel))
    source = str(arguments.source) if is_url(arguments.source) else str(arguments.data.absolute())
    record = Record(arguments.name, to_toml(base), masked(source), manifest.fingerprint)
    return Plan(experiment, tuple(tasks), configs, record, arguments.data, source, arguments.parallel, cpus)


def _checked(name: str, config: Config, manifest: Manifest, data: Path) -> Config:
    """A variant's recipe, which its data set fits."""
    try:
        config = fit.check_fits(config, manifest, data)
        check_replicas(config, 1)
        return config
    except (TrainerError, PipelineError) as error:
        raise RecipeError(f"variant {name}: {error}") from None


def _run(plan: Plan, arguments: argparse.Namespace, device: str) -> int:
    """Makes what is missing; the rows are written after every run."""
    from trainer.experiments.page import write_results

    found = rows.read_rows(arguments.output)
    missing = [task for task in plan.tasks if not _is_done(found, task, plan.experiment)]
    progress = ExperimentProgress(plan.tasks, missing)
    stop = stopping.StopRequest()
    with stopping.handled_by(stop.note):
        _look_for_room(plan, missing)
        for ending in _endings(plan, arguments, missing, stop, progress):
            if stop.name and ending.status:
                continue  # it was stopped: no failure
            row = _row(plan, ending, device)
            found[ending.task.variant, ending.task.seed] = row
            rows.write_rows(arguments.output, rows.in_order(plan.experiment, found))
            progress.ended(ending.task, row)
        ours = [found[key] for task in plan.tasks if (key := (task.variant, task.seed)) in found]
        path = write_results(arguments.output, plan.experiment, plan.tasks, ours)
    print(path, flush=True)
    stopping.finish()
    return _tell(plan, ours, stop)


def _tell(plan: Plan, found: Sequence[Row], stop: stopping.StopRequest) -> int:
    """Says what is missing; the exit status."""
    failed = [row for row in found if row["status"] != rows.OK]
    for row in failed:
        print_error(f"{row['variant']}, seed {row['seed']}: {row['reason']}")
    if failed:
        print(
            f"{pluralize(len(failed), 'run')} of {len(plan.tasks)} failed and count in no average; the same command "
            "tries again",
            file=sys.stderr,
        )
    if stop.name:
        done = len(found) - len(failed)
        print(
            f"stopped by {stop.name}: {done} of {pluralize(len(plan.tasks), 'run')} are done; the same command goes on"
        )
    return DONE_IN_PART if failed or stop.name else 0


def _is_done(found: dict[tuple[str, int], Row], task: RunTask, experiment: Experiment) -> bool:
    """Whether a run has its row, its result, and what was measured of it."""
    row = found.get((task.variant, task.seed))
    keys = {metric.key for metric in experiment.metrics}
    measured = experiment.measure in ("none", "epochs") or task.measured.exists()
    if row is None or row["status"] != rows.OK or not keys <= row.keys():
        return False
    return folders.is_finished(task) and measured


def _look_for_room(plan: Plan, missing: Sequence[RunTask]) -> None:
    """Refuses a disk that the first run would fill; each training looks again."""
    from trainer.experiments.estimate import run_bytes

    if missing:
        start.check_writable(missing[0].run, max(map(run_bytes, plan.tasks)))


def _endings(
    plan: Plan,
    arguments: argparse.Namespace,
    missing: Sequence[RunTask],
    stop: stopping.StopRequest,
    progress: ExperimentProgress,
) -> Iterator[runner.Ending]:
    """Runs what is missing, wherever it is to run."""

    def words(task: RunTask) -> list[str]:
        threads = max(1, plan.cpus // task.processes)
        return task.command(plan.source, threads=threads, device=arguments.device)

    orders = runner.Orders(words, stop, progress.tick)
    if arguments.address:
        return runner.run_on_cluster(missing, orders, runner.Place(arguments.address, plan.cpus, arguments.gpus))
    return runner.run_here(missing, orders, parallel=plan.parallel)


def _row(plan: Plan, ending: runner.Ending, device: str) -> Row:
    """The row of a run that has ended; it is measured here, wherever it was trained."""
    task = ending.task
    if ending.status:
        return rows.failed_row(task, ending.status, ending.reason)
    began = time.monotonic()
    try:
        measured = measures.measure(plan.experiment.measure, task, plan.data, device)
        measures.save(task.measured, measured.arrays)
        row = rows.finished_row(task, measured.figures)
    except (TrainerError, PipelineError) as error:
        return rows.failed_row(task, 2, f"trained, but not measured: {error}")
    verbosity.log.debug("%s measured in %.1f s", task.name, time.monotonic() - began)
    return row
