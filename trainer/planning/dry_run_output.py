"""A plan of a run (:mod:`trainer.planning.dry_run`) as tables."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from trainer.planning.dry_run import CrossingRow, RunPlan


def print_plan(plan: RunPlan) -> None:
    """Prints a plan for people."""
    console = Console(width=None if Console().is_terminal else 110, highlight=False)
    train = plan.config.train
    more = f", {plan.done:,} of them done" if plan.done else ""
    towers = "one process" if plan.processes == 1 else "two processes, one a tower"
    towers = f"{plan.replicas} replicas of {towers}" if plan.replicas > 1 else towers
    console.print(f"{towers}, {plan.device}, {train.precision}, batch {train.batch_size}")
    console.print(
        f"{train.epochs} epochs of {plan.steps_per_epoch:,} steps: {plan.steps:,} steps{more}", soft_wrap=True
    )
    _print_memory(plan, console)
    if plan.crossings:
        _print_crossings(plan.crossings, console)
    elif plan.config.model.towers == 2:
        console.print("One process: nothing crosses.")
    if plan.step_s is None or plan.remaining_s is None:
        console.print(f"time: {plan.measured}", soft_wrap=True)
    else:
        console.print(
            f"time: {plan.step_s:.3g} s a step, {train.batch_size / plan.step_s:,.0f} images/s; "
            f"{_duration(plan.remaining_s)} for the steps, evaluations not counted\n      ({plan.measured})",
            soft_wrap=True,
        )


def _print_memory(plan: RunPlan, console: Console) -> None:
    """The memory table."""
    table = Table(title="memory, MiB", title_justify="left")
    table.add_column("process")
    for heading in ("parameters", "gradients", "velocities", "kept for backward", "batches", "total"):
        table.add_column(heading, justify="right")
    for row in plan.memory:
        cells = (row.parameters, row.parameters, row.parameters, row.kept, row.batches, row.total)
        table.add_row(row.holder, *(f"{cell / 2**20:,.1f}" for cell in cells))
    console.print(table)
    if plan.available_bytes is not None:
        fits = "fits" if plan.needed_bytes <= plan.available_bytes else "does NOT fit"
        where = "the device" if plan.device != "cpu" else "the machine"
        console.print(
            f"{fits}: {where} has {plan.available_bytes / 2**20:,.0f} MiB free, "
            f"{plan.needed_bytes / 2**20:,.0f} are needed, and scratch memory on top",
            soft_wrap=True,
        )


def _print_crossings(rows: Sequence[CrossingRow], console: Console) -> None:
    """The crossings of a step."""
    total = sum(row.num_bytes for row in rows)
    table = Table(title="what would cross in a step, bytes", title_justify="left", show_footer=True)
    table.add_column("input of", footer="both ways")
    table.add_column("phase")
    table.add_column("direction")
    table.add_column("bytes", justify="right", footer=f"{total:,}")
    for row in rows:
        table.add_row(row.name, row.phase, row.direction, f"{row.num_bytes:,}")
    console.print(table)


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
