"""The communication of a step on many GPUs (:mod:`trainer.planning.scale`) as a table."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.planning.scale import Wires

FORMULA = (
    "MODEL, not measured: step = compute + crossing + max(0, sum - 2/3 compute) + control; "
    "crossing = bytes / pair bandwidth + messages x latency; "
    "sum = 2 (R - 1) / R x bytes / bandwidth + sums x 2 (R - 1) x latency; control = R x latency; "
    "the slower tower; no loading, evaluation or checkpoints"
)


def print_scale(table: Sequence[dict[str, Any]], pictures: int, wires: Wires | None) -> None:
    """Prints the count, and the model where there is one."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(
        f"{pictures} pictures a pair and step; counted by running the trainer's step on a fake process group. "
        "A GPU, a step:",
        soft_wrap=True,
    )
    console.print(_counted(table))
    if wires is None:
        console.print("Add --bandwidth-gb-s, --latency-us and --tflops for the predicted time of a step.")
        return
    console.print(_predicted(table))
    console.print(FORMULA, soft_wrap=True)
    console.print(
        f"given: {wires.bandwidth_gb_s:g} GB/s between replicas, {wires.pair_bandwidth_gb_s:g} GB/s in a pair, "
        f"{wires.latency_us:g} us a message, {wires.tflops:g} TFLOP/s a GPU",
        soft_wrap=True,
    )


def _counted(table: Sequence[dict[str, Any]]) -> Table:
    """The count of both towers."""
    shown = Table(title="counted, bytes: tower a | tower b", title_justify="left")
    for heading in ("GPUs", "batch", "crossings sent", "messages", "gradients summed", "sums", "control"):
        shown.add_column(heading, justify="right")
    names = ("crossing_bytes", "crossing_calls", "sum_bytes", "sum_calls", "control_bytes")
    for row in table:
        cells = [" | ".join(f"{tower[name]:,}" for tower in row["counted"]) for name in names]
        shown.add_row(f"{row['gpus']}", f"{row['batch_size']:,}", *cells)
    return shown


def _predicted(table: Sequence[dict[str, Any]]) -> Table:
    """The model."""
    shown = Table(title="predicted (a model), ms", title_justify="left")
    for heading in ("GPUs", "compute", "crossing", "sum", "control", "step", "images/s", "of 2 GPUs x n"):
        shown.add_column(heading, justify="right")
    first = table[0]["batch_size"] / table[0]["gpus"] / table[0]["model"]["step_s"]
    for row in table:
        model = row["model"]
        cells = [f"{1e3 * model[f'{part}_s']:.2f}" for part in ("compute", "crossing", "sum", "control", "step")]
        rate = row["batch_size"] / model["step_s"]
        shown.add_row(f"{row['gpus']}", *cells, f"{rate:,.0f}", f"{rate / row['gpus'] / first:.0%}")
    return shown
