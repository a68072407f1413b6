"""A benchmark's result on the terminal: tables and sentences."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from trainer.bench.bottleneck import Verdict, judge
from trainer.bench.compare import Difference
from trainer.bench.prediction import Projection, costs_of, predict_rate
from trainer.bench.record import BenchRecord, Figure, Stage, Whole

IMPOSSIBLE = 1.1  # times the slower of loader and training alone: noise explains no more
RESTLESS = 1.5  # upper quartile over lower


def print_record(record: BenchRecord, verdict: Verdict, projections: Sequence[Projection] = ()) -> None:
    """Prints everything that was measured, and what follows from it."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    setting = record.setting
    console.print(
        f"{setting.recipe}, {setting.pictures}, batch {setting.batch_size}, {setting.precision}, {setting.device}, "
        f"{setting.processes} process{'es' if setting.processes > 1 else ''}, {setting.cores} cores"
    )
    _print_ceilings(console, record)
    _print_stages(console, record)
    _print_wholes(console, record)
    for point in record.sweep:
        console.print(f"batch size {point.x}: {point.images_per_s:,.0f} images/s")
    if doubt := doubt_sentence(record):
        console.print(f"\n[bold red]{doubt}[/bold red]")
    console.print(f"\n[bold]{verdict.sentence}[/bold]")
    if verdict.suggestions:
        console.print(advice_sentence(record))
    for suggestion in verdict.suggestions:
        console.print(
            f"- {suggestion.change}: {suggestion.factor:.2f} times, {suggestion.images_per_s:,.0f} images/s "
            f"({suggestion.basis})"
        )
    if not verdict.suggestions:
        console.print("- no change that this benchmark can compute promises 3 % or more")
    _print_projections(console, record, projections)


def _print_ceilings(console: Console, record: BenchRecord) -> None:
    table = Table("ceiling", "half of the measurements", "", "n", "how", box=None, pad_edge=False)
    for ceiling in record.ceilings:
        figure = ceiling.figure
        table.add_row(ceiling.name, half_within(figure), ceiling.unit, str(figure.n), ceiling.note)
    console.print(table, "")


def _print_stages(console: Console, record: BenchRecord) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for name in ("ms a batch", "half within", "n", "cpu ms", "images/s", "of ceiling"):
        table.add_column(name, justify="right")
    table.add_column("")
    for stage in record.stages:
        table.add_row(*stage_cells(stage))
    console.print(table, "")


def stage_cells(stage: Stage) -> list[str]:
    """A stage as text: name, ms, quartiles, n, processor ms, rate, share of its ceiling, which one and note."""
    share = stage.share_of_ceiling
    indent = "  " if stage.group == "crossing" else ""
    return [
        indent + stage.name,
        number(stage.ms.median),
        half_within(stage.ms),
        str(stage.ms.n),
        number(stage.cpu_ms) if stage.cpu_ms is not None else "",
        f"{stage.images_per_s:,.0f}" if stage.ms.median > 0 else "",
        percent(share) if share is not None else "",
        "; ".join(text for text in (stage.ceiling, stage.note) if text),
    ]


def _print_wholes(console: Console, record: BenchRecord) -> None:
    for name, whole in wholes(record):
        console.print(
            f"{name:20} {whole.images_per_s:9,.1f} images/s  {number(whole.ms.median)} ms a batch "
            f"({half_within(whole.ms)}, n {whole.ms.n}), {number(whole.cpu_ms)} ms of processor time"
        )
    if record.whole is None:
        return
    console.print(prediction_sentence(record))
    console.print(share_sentence(record))


def wholes(record: BenchRecord) -> list[tuple[str, Whole]]:
    """The wholes that were measured, named."""
    named = (("loader alone", record.loader), ("synthetic training", record.synthetic), ("end to end", record.whole))
    return [(name, whole) for name, whole in named if whole]


def prediction_sentence(record: BenchRecord) -> str:
    """The rate that the stages predict beside the measured one."""
    assert record.whole is not None
    predicted, costs = predict_rate(record), costs_of(record)
    stall = f" + {number(costs.stall_ms)} of standing still for the loader's threads" if costs.stall_ms else ""
    return (
        f"predicted from the stages: {predicted:,.1f} images/s; "
        f"measured {record.whole.images_per_s / predicted:.2f} of it. The prediction is the longest of three: "
        f"the loader alone {number(costs.loader_ms)} ms; training alone {number(costs.net_ms)} + "
        f"{number(costs.own_ms)} of the loader's work in its thread{stall} = "
        f"{number(costs.net_ms + costs.own_ms + costs.stall_ms)} ms; the processor time of both over {costs.cores} "
        f"cores {number(costs.processor_ms)} ms (docs/bench.md)"
    )


def share_sentence(record: BenchRecord) -> str:
    """End to end as a share of the slower of loader and synthetic training."""
    assert record.whole is not None and record.loader is not None
    slower = min(record.loader.images_per_s, record.synthetic.images_per_s)
    shared = (
        "" if record.setting.device.startswith("cuda") else "; on a CPU both share the cores, so less than 1 is normal"
    )
    return f"end to end is {record.whole.images_per_s / slower:.2f} of the slower of loader and training alone{shared}"


def doubt_sentence(record: BenchRecord) -> str:
    """What makes a result doubtful: a rate that cannot be, or rounds that differ by much; empty where nothing does."""
    again = "Something else probably used this machine: measure again when it is idle, or with a larger --seconds"
    if record.whole and record.loader:
        ratio = record.whole.images_per_s / min(record.loader.images_per_s, record.synthetic.images_per_s)
        if ratio > IMPOSSIBLE:
            return (
                "These figures contradict each other: end to end cannot be faster than the loader alone or training "
                f"alone, and was {ratio:.2f} times as fast as the slower of them. {again}."
            )
    for name, whole in wholes(record):
        if whole.ms.high > RESTLESS * whole.ms.low:
            return f"The rounds differ by much: {name} took {half_within(whole.ms)} ms a batch. {again}."
    return ""


def advice_sentence(record: BenchRecord) -> str:
    """What the factors of the suggestions are of, and how a suggestion is tried."""
    rate, predicted = (record.whole or record.synthetic).images_per_s, predict_rate(record)
    of = f"the {rate:,.0f} images/s measured"
    if record.whole:
        of = f"the {predicted:,.0f} images/s predicted"
    if record.whole and record.sweep:
        of += f" (another batch size: of the {rate:,.0f} measured)"
    return (
        f"What would help, each alone, in times of {of}; try a field of the recipe with --set, such as "
        "--set train.precision=bf16:"
    )


def _print_projections(console: Console, record: BenchRecord, projections: Sequence[Projection]) -> None:
    measured = {point.x: point for point in record.scaling}
    if projections:
        console.print(f"model: {projections[0].basis}; measured: training on synthetic pictures")
    for row in projections:
        beside = measured.get(row.processes)
        check = f", measured here {beside.images_per_s:,.1f}" if beside else ""
        name = "1 process" if row.processes == 1 else f"{row.processes} processes"
        parts = [number(ms) for ms in (row.compute_ms, row.crossing_ms, row.reduce_ms, row.loader_ms)]
        console.print(
            f"model, {name}: {row.images_per_s:,.1f} images/s{check} (computation {parts[0]}, crossings {parts[1]}, "
            f"averaging {parts[2]}, loader {parts[3]} ms)"
        )


@dataclasses.dataclass(frozen=True)
class NodeRow:
    """One node of several.

    Attributes:
        node: its name.
        loader, synthetic, end_to_end: images a second; None where it was not measured.
        share: of the fastest node's rate (end to end, or synthetic without data), 0..1.
        limit: the stage that limits it.
    """

    node: str
    loader: float | None
    synthetic: float
    end_to_end: float | None
    share: float
    limit: str


def node_rows(records: Sequence[BenchRecord]) -> list[NodeRow]:
    """Results of several nodes, the slowest first: a run on all of them goes at its pace."""
    rates = [(record.whole or record.synthetic).images_per_s for record in records]
    rows = [
        NodeRow(
            node=str(record.environment.get("host", "")),
            loader=record.loader.images_per_s if record.loader else None,
            synthetic=record.synthetic.images_per_s,
            end_to_end=record.whole.images_per_s if record.whole else None,
            share=rate / max(rates),
            limit=judge(record).limit,
        )
        for record, rate in zip(records, rates, strict=True)
    ]
    return sorted(rows, key=lambda row: row.share)


def print_nodes(rows: Sequence[NodeRow]) -> None:
    """Prints nodes side by side."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("node, images/s")
    for name in ("end to end", "loader", "synthetic", "of the fastest"):
        table.add_column(name, justify="right")
    table.add_column("limit")
    for row in rows:
        cells = ["" if rate is None else f"{rate:,.0f}" for rate in (row.end_to_end, row.loader, row.synthetic)]
        table.add_row(row.node, *cells, f"{row.share:.0%}", row.limit)
    console.print(table)
    slowest = rows[0]
    console.print(f"A run on all of them goes at the pace of {slowest.node}: {slowest.share:.0%} of the fastest.")


def print_comparison(rows: Sequence[Difference], settings: Sequence[tuple[str, str, str]]) -> None:
    """Prints two results side by side."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    for name, left, right in settings:
        console.print(f"{name}: {left} | {right}")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("a", "b"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("verdict")
    for row in rows:
        table.add_row(row.name, _side(row.a), _side(row.b), row.unit, outcome(row))
    console.print("", table)
    console.print(
        "\nMedians; less time, or a higher ceiling, wins. Less than 3 % apart, or their ± (1.57 IQR / sqrt(n)) "
        "overlapping, is no difference."
    )


def outcome(row: Difference) -> str:
    """``b is 1.31 times better``, ``no difference``, or who alone measured it."""
    if row.better == "":
        return "only in a" if row.a else "only in b"
    return "no difference" if row.better == "none" else f"{row.better} is {row.factor:.2f} times better"


def _side(figure: Figure | None) -> str:
    return f"{number(figure.median)} ±{number(figure.noise)}" if figure else ""


def half_within(figure: Figure) -> str:
    """The quartiles, between which half of the measurements lie."""
    return f"{number(figure.low)}–{number(figure.high)}"


def percent(share: float) -> str:
    """Whole percents; what rounds to none is ``<1%``."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def number(value: float) -> str:
    """Three digits at least: 0.0123, 12.3, 1,234."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
