"""A benchmark's result on the terminal; two results side by side, and those of several nodes."""

import dataclasses
import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from trainer.bench.bottleneck import Bottleneck, find_doubt, judge, share_of_slower
from trainer.bench.prediction import Projection, costs_of, predict_rate
from trainer.bench.record import BenchRecord, Figure, Stage, differ
from twotower.words import pluralize

CEILING_HEAD = ("ceiling", "median", "half within", "", "n", "how")
MODEL = "each pair takes the recipe's batch, and nothing else uses the wire"
SETTING = re.compile(r"\w+\.\w+ = \S+")  # of a recipe
STAGE_HEAD = ("stage", "ms per batch", "half within", "n", "cpu ms", "images/s", "of ceiling", "")


def number(value: float) -> str:
    """Three digits at least: 0.0123, 12.3, 1,234."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def half_within(figure: Figure) -> str:
    """The quartiles, between which half of the measurements lie."""
    return f"{number(figure.low)}–{number(figure.high)}"


def percent(share: float) -> str:
    """Whole percents; what rounds to none is ``<1%``."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def stage_cells(stage: Stage) -> list[str]:
    """A stage under :data:`STAGE_HEAD`."""
    share = stage.share_of_ceiling
    return [
        "  " * (stage.group == "crossing") + stage.name,
        number(stage.ms.median),
        half_within(stage.ms),
        str(stage.ms.n),
        "" if stage.cpu_ms is None else number(stage.cpu_ms),
        f"{stage.images_per_s:,.0f}" if stage.ms.median > 0 else "",
        "" if share is None else percent(share),
        "; ".join(text for text in (stage.ceiling, stage.note) if text),
    ]


def ceiling_cells(record: BenchRecord) -> list[list[str]]:
    """The ceilings under :data:`CEILING_HEAD`."""
    return [
        [row.name, number(row.figure.median), half_within(row.figure), row.unit, str(row.figure.n), row.note]
        for row in record.ceilings
    ]


def about(record: BenchRecord) -> str:
    """What was measured, and on what."""
    workload, processor = record.workload, record.environment.get("processor", "an unnamed processor")
    count = "one process" if workload.processes == 1 else f"{workload.processes} processes, one per tower"
    return (
        f"{workload.images}, batch {workload.batch_size}, {workload.precision}, {workload.device}, {count}, "
        f"{pluralize(workload.cores, 'core')} of {processor}"
    )


def prediction_sentence(record: BenchRecord) -> str:
    """The rate that the stages predict beside the measured one."""
    assert record.end_to_end is not None
    predicted, costs = predict_rate(record), costs_of(record)
    stall = f" + {number(costs.stall_ms)} of standing still for the loader's threads" if costs.stall_ms else ""
    return (
        f"The rate predicted from the stages is {predicted:,.1f} images/s; "
        f"measured {record.end_to_end.images_per_s / predicted:.2f} of it. The prediction is the longest of three: "
        f"the loader alone {number(costs.loader_ms)} ms; training alone {number(costs.net_ms)} + "
        f"{number(costs.own_ms)} of the loader's work in its thread{stall} = "
        f"{number(costs.net_ms + costs.own_ms + costs.stall_ms)} ms; the processor time of both over {costs.cores} "
        f"cores {number(costs.processor_ms)} ms (docs/bench.md)."
    )


def share_sentence(record: BenchRecord) -> str:
    """End to end as a share of the slower of loader and synthetic training."""
    on_gpu = record.workload.device.startswith("cuda")
    shared = "" if on_gpu else "; on a CPU both share the cores, so less than 1 is normal"
    return f"End to end is {share_of_slower(record):.2f} of the slower of loader and training alone{shared}."


def advice_sentence(record: BenchRecord, found: Bottleneck) -> str:
    """What the factors of the suggestions are of, and how one is tried; what else would help where there are none."""
    if not found.suggestions:
        return found.otherwise
    rate = record.training.images_per_s
    of = f"the {rate:,.0f} images/s measured"
    if record.end_to_end:
        of = f"the {predict_rate(record):,.0f} images/s predicted"
        of += f" (another batch size: of the {rate:,.0f} measured)" if record.sweep else ""
    fields = [row.change.replace(" ", "") for row in found.suggestions if SETTING.fullmatch(row.change)]
    tried = f"; try a field of the recipe with --set, such as --set {fields[0]}" if fields else ""
    return f"What would help, each alone, in times of {of}{tried}:"


def tried_sentence(record: BenchRecord) -> str:
    """What training alone did with other settings in the same run; empty where none was tried."""
    tried = {f"train.threads = {count}": row for count, row in record.by_threads.items()}
    tried |= {f"train.precision = '{name}'": row for name, row in record.by_precision.items()}
    rates = [f"{name} {row.images_per_s:,.0f} images/s" for name, row in tried.items()]
    return f"Tried in the same run, training alone: {'; '.join(rates)}." if rates else ""


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 120, highlight=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> Table:
    """Columns are right-aligned, but those in ``left``."""
    table = Table(box=None, pad_edge=False)
    for column, name in enumerate(head):
        table.add_column(name, justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def print_record(record: BenchRecord, found: Bottleneck, projections: Sequence[Projection] = ()) -> None:
    """Prints everything that was measured, and what follows from it."""
    console = _console()
    console.print(f"{record.workload.recipe}, {about(record)}")
    if found.doubt:
        console.print(f"[bold red]{found.doubt}[/bold red]")
    console.print(_table(CEILING_HEAD, ceiling_cells(record), left=(0, 3, 5)), "")
    console.print(_table(STAGE_HEAD, [stage_cells(stage) for stage in record.stages], left=(0, 7)), "")
    for name, rate in record.throughputs().items():
        console.print(
            f"{name:20} {rate.images_per_s:9,.1f} images/s  {number(rate.ms.median)} ms per batch "
            f"({half_within(rate.ms)}, n {rate.ms.n}), {number(rate.cpu_ms)} ms of processor time"
        )
    if record.end_to_end:
        console.print(prediction_sentence(record))
        console.print(share_sentence(record))
    for size, figure in record.sweep.items():
        console.print(f"batch size {size}: {figure.median:,.0f} images/s ({half_within(figure)})")
    console.print(f"\n[bold]{found.sentence}[/bold]")
    if tried := tried_sentence(record):
        console.print(tried)
    console.print(advice_sentence(record, found))
    for row in found.suggestions:
        console.print(f"- {row.change}: {row.factor:.2f} times, {row.images_per_s:,.0f} images/s ({row.basis})")
    if projections:
        console.print(f"model, no measurement; it assumes that {MODEL}; {projections[0].basis}")
    measured = {count: f", measured here {figure.median:,.1f}" for count, figure in record.scaling.items()}
    for model in projections:
        name = "1 process" if model.processes == 1 else f"{model.processes} processes"
        console.print(
            f"model, {name}: {model.images_per_s:,.1f} images/s{measured.get(model.processes, '')} (computation "
            f"{number(model.compute_ms)}, crossings {number(model.crossing_ms)}, averaging {number(model.sum_ms)}, "
            f"control {number(model.control_ms)}, loader {number(model.loader_ms)} ms)"
        )


@dataclasses.dataclass(frozen=True)
class NodeRow:
    """One node of several; rates in images per second, None where it was not measured."""

    node: str
    loader: float | None
    synthetic: float
    end_to_end: float | None
    share: float  # of the fastest node's rate (end to end, or synthetic without data), 0..1
    limit: str  # the stage that limits it


def node_rows(records: Sequence[BenchRecord]) -> list[NodeRow]:
    """Results of several nodes, the slowest first: a run on all of them goes at its pace."""
    fastest = max(record.training.images_per_s for record in records)
    rows = [
        NodeRow(
            node=str(record.environment.get("host", "")),
            loader=record.loader.images_per_s if record.loader else None,
            synthetic=record.synthetic.images_per_s,
            end_to_end=record.end_to_end.images_per_s if record.end_to_end else None,
            share=record.training.images_per_s / fastest,
            limit=judge(record).limit,
        )
        for record in records
    ]
    return sorted(rows, key=lambda row: row.share)


def print_nodes(rows: Sequence[NodeRow]) -> None:
    """Prints nodes side by side."""
    head = ("node, images/s", "end to end", "loader", "synthetic", "of the fastest", "limit")
    cells = []
    for row in rows:
        rates = ["" if rate is None else f"{rate:,.0f}" for rate in (row.end_to_end, row.loader, row.synthetic)]
        cells.append([row.node, *rates, f"{row.share:.0%}", row.limit])
    console = _console()
    console.print(_table(head, cells, left=(0, 5)))
    slowest = rows[0]
    console.print(f"A run on all of them goes at the pace of {slowest.node}: {slowest.share:.0%} of the fastest.")


@dataclasses.dataclass(frozen=True)
class Difference:
    """One line of a comparison."""

    name: str
    unit: str
    a: Figure | None  # None where this result lacks it
    b: Figure | None
    better: str = ""  # a, b, none (no difference), once (no spread is known), or empty where only one has it
    factor: float = 1.0  # the better one over the other, >= 1

    def words(self) -> str:
        """The outcome for people."""
        if not self.better:
            return "only in a" if self.a else "only in b"
        if self.better == "none":
            return "no difference"
        if self.better == "once":
            return "measured once: no outcome"
        kind = "as fast" if self.unit.startswith("us") else "as high"
        return f"{self.better} is {self.factor:.2f} times {kind}"


def compare(a: BenchRecord, b: BenchRecord) -> list[Difference]:
    """Throughputs, stages and ceilings of two results, in the first one's order."""
    left, right = _figures_of(a), _figures_of(b)
    rows = []
    for name, unit in left | right:
        one, two = left.get((name, unit)), right.get((name, unit))
        better, factor = "", 1.0
        if one and two:
            better = "none" if min(one.n, two.n) > 1 else "once"
            if better == "none" and differ(one, two):
                a_wins = (one.median < two.median) == unit.startswith("us")  # a time, or the latency of the wire
                low, high = sorted((one.median, two.median))
                better, factor = "a" if a_wins else "b", high / low if low > 0 else float("inf")
        rows.append(Difference(name, unit, one, two, better, factor))
    return rows


def comparison_sentence(a: BenchRecord, b: BenchRecord) -> str:
    """The rates of two results against each other, in one sentence."""
    rates = [row for row in compare(a, b) if row.name in a.throughputs() or row.name in b.throughputs()]
    return "; ".join(f"{row.name}: {row.words()}" for row in reversed(rates)) + "."


def _figures_of(record: BenchRecord) -> dict[tuple[str, str], Figure]:
    """Every figure by name and unit; times are per image, so that batches of other sizes can stand side by side."""
    times = [(name, rate.ms) for name, rate in record.throughputs().items()] + [
        (stage.name, stage.ms) for stage in record.stages
    ]
    found = {(name, "us per image"): ms.scaled(1e3 / record.workload.batch_size) for name, ms in times}
    return found | {(row.name, row.unit): row.figure for row in record.ceilings}


def differing_settings(a: BenchRecord, b: BenchRecord) -> list[tuple[str, str, str]]:
    """What was set or found differently: (name, in a, in b)."""
    left, right = (
        dataclasses.asdict(record.workload)
        | {key: record.environment.get(key) for key in ("processor", "gpus", "torch", "commit")}
        for record in (a, b)
    )
    return [(key, str(left[key]), str(right[key])) for key in left if left[key] != right[key]]


def _with_noise(figure: Figure) -> str:
    return f"{number(figure.median)} ±{number(figure.noise)}" if figure.n > 1 else number(figure.median)


def print_comparison(a: BenchRecord, b: BenchRecord) -> None:
    """Prints two results side by side."""
    console = _console()
    for setting, left, right in differing_settings(a, b):
        console.print(f"{setting}: {left} | {right}")
    cells = []
    for row in compare(a, b):
        sides = [_with_noise(side) if side else "" for side in (row.a, row.b)]
        cells.append([row.name, *sides, row.unit, row.words()])
    console.print("", _table(("", "a", "b", "", "outcome"), cells, left=(0, 3, 4)))
    console.print(f"\n[bold]{comparison_sentence(a, b)}[/bold]")
    for name, record in (("a", a), ("b", b)):
        if doubt := find_doubt(record):
            console.print(f"[bold red]{name}: {doubt}[/bold red]")
    console.print(
        "\nMedians; less time, or a higher ceiling, wins. Less than 3 % apart, or their ± (1.57 IQR / sqrt(n)) "
        "overlapping, is no difference."
    )
