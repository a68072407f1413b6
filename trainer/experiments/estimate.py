"""What an experiment would take: runs, hours, disk. Each variant's step is measured, as ``train --dry-run`` does."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from trainer.config import Config
from trainer.experiments.catalog import count_four_layers
from trainer.experiments.folder import RunTask
from trainer.experiments.variants import Experiment
from trainer.planning.describe import to_dict
from twotower.words import pluralize

if TYPE_CHECKING:
    from trainer.planning.dry_run import RunPlan

KEPT = 2  # checkpoints of a run at its end: the newest and the best


def count_parameters(config: Config, *, four_layers: bool) -> int:
    """Weights and biases of a run's net: the recipe's, or figure 1's."""
    return count_four_layers(config.model) if four_layers else int(to_dict(config.model)["parameters"])


def run_bytes(task: RunTask) -> int:
    """What a run's checkpoints take at most, bytes: weights and velocities in float32, one more while it is written."""
    return 8 * count_parameters(task.config, four_layers=task.four_layers) * (KEPT + 1)


def print_estimate(
    experiment: Experiment, tasks: Sequence[RunTask], configs: Mapping[str, Config], data: Path, device: str
) -> None:
    """Prints a row for each variant, and the sums; steps are measured one variant after the other."""
    table = Table(title=experiment.title, title_justify="left")
    for heading in ("variant", "runs", "steps a run", "s a step", "hours", "disk, GiB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    hours, disk, unknown = 0.0, 0.0, []
    for variant in experiment.variants:
        config = configs[variant.name]
        runs = sum(task.variant == variant.name for task in tasks)
        found = _plan(config, data, device, four_layers=variant.four_layers)
        size = runs * KEPT * 8 * count_parameters(config, four_layers=variant.four_layers) / 2**30
        disk += size
        if found.remaining_s is None:
            unknown.append(variant.title)
            table.add_row(variant.name, str(runs), f"{found.steps:,}", found.measured, "", f"{size:.3g}")
            continue
        spent = runs * found.remaining_s / 3600
        hours += spent
        table.add_row(variant.name, str(runs), f"{found.steps:,}", f"{found.step_s:.3g}", f"{spent:.3g}", f"{size:.3g}")
    console = Console(width=None if Console().is_terminal else 110, highlight=False)
    console.print(table)
    text = f"{pluralize(len(tasks), 'run')}, {hours:.3g} hours of steps one after the other, {disk:.3g} GiB"
    console.out(text + (f"; not counted: {', '.join(unknown)}" if unknown else ""))
    console.out(
        "Steps were measured now, both towers in one process on made-up images, with all cores: loading, start,"
    )
    console.out("evaluation and what else this machine does come on top, and runs at once share its cores.")


def _plan(config: Config, data: Path, device: str, *, four_layers: bool) -> "RunPlan":
    """Steps of a run and the time of one, measured now; imports torch."""
    from trainer.planning.dry_run import plan_run
    from trainer.precision import resolve_precision

    found = plan_run(resolve_precision(config, device), data, device=device, measure=not four_layers)
    if not four_layers:
        return found
    from trainer.experiments.four_layers import step_seconds

    return dataclasses.replace(found, step_s=step_seconds(config, device))
