"""``report.html``, ``table.md``, ``bytes.csv`` and ``summary.json`` of one-weird-trick."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from pipeline.manifest import write_atomic
from trainer.errors import RunError
from trainer.experiments import tables
from trainer.experiments.one_weird_trick.found import (
    CLAIMED,
    COMPARED,
    TITLES,
    WORLDS,
    Found,
    Traffic,
    median_and_range,
)
from trainer.experiments.one_weird_trick.traffic import BATCHES, Sent, crossover, total_bytes
from trainer.experiments.options import ONE_WEIRD_TRICK
from trainer.report import page as html
from trainer.report.charts import COLORS, drawing, inline_svg, plain_axes
from twotower.words import pluralize

PAGE_NAME, TABLE_NAME, SUMMARY_NAME, BYTES_NAME = "report.html", "table.md", "summary.json", "bytes.csv"
TITLE = "One weird trick: convolutions share the batch, fully connected layers the units"
QUESTION = (
    "Krizhevsky, 2014 (arXiv 1404.5997): each worker has all convolutions and half of the batch, and half of the units "
    "of fc6, fc7 and fc8 for all of the batch. The net is one tower as wide as both towers together. Does it do what "
    "one process does, what does it send beside the two towers, and how fast is it here?"
)
SCHEME = (
    "Scheme (a) of that paper: at fc6 each worker assembles the rows of both. Its schemes (b) and (c) let rows take "
    "turns, so that one worker's travel while another's are computed. Here fc6 is computed for a worker's own rows "
    "while the other's travel, and weights are updated once a batch, as one process does it."
)
NOTES = (
    SCHEME,
    "2 x 2 processes are two pairs of workers, each with half of the batch: all gradients are summed over the pairs.",
    "The two nets are not the same: of the one tower's layers conv2, conv4 and conv5 see all channels, and have twice "
    "the weights. What each layout sends is compared, not what the nets learn.",
    "Bytes are float32, forward and backward, of one process; the others send as many. They come from the ledger of a "
    "group that sends to nobody, and equal the formula, as the ledgers of the real processes above do. Of a sum of "
    "gradients the ledger has the bytes that take part; shown is what leaves a process if they sum as a ring: with two "
    "processes as much, with four 1.5 times that. The 48 control bytes of a training step are not counted.",
    "Softmax is kept, so workers exchange two numbers an image at the loss. The net of Krizhevsky's paper has logistic "
    "outputs, which need none.",
)
SPEED_NOTE = (
    "These processes share this machine's cores and its memory. One process with all of the cores does the same work "
    "without sending, so two can hardly be faster than that: what this shows is the cost of a layout, not its use. "
    "Beside one process with half of the cores a second process is what a second GPU would be, but gloo on one machine "
    "is no wire between GPUs. Krizhevsky's figures, 1.93 times on two and 6.16 times on eight GPUs (ILSVRC-2012), can "
    "neither be confirmed nor refuted here."
)
EQUAL_HEAD = ("processes", "numbers", "seeds", *(f"{what}" for what in COMPARED))
SPEED_HEAD = ("net", "how", "images/s", "beside one with half of the cores", "beside one with all")
HOW = {"share": "one process, half of the cores", "all": "one process, all cores", "pair": "two processes"}
NETS = {"two-towers": "two towers", "one-tower": "one tower (workers)"}


def write_results(folder: Path, found: Found) -> Path:
    """Writes all four; returns the path of the page.

    Raises:
        RunError: they cannot be written.
    """
    try:
        write_atomic(folder / SUMMARY_NAME, to_json(found).encode())
        write_atomic(folder / TABLE_NAME, markdown(found).encode())
        write_atomic(folder / BYTES_NAME, bytes_csv(found.traffic).encode())
        write_atomic(folder / PAGE_NAME, render(found).encode())
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from None
    return folder / PAGE_NAME


def render(found: Found) -> str:
    """The page as HTML text."""
    body = [
        html.header("twotower, experiment one-weird-trick", TITLE, QUESTION),
        html.headline(_headline(found)),
        *_failures(found),
        html.section(
            "Equality with one process",
            html.paragraph(equality_words(found)),
            html.table(list(EQUAL_HEAD), equality_table(found), range(3, 6)),
        ),
        *_traffic(found.traffic),
        *_speed(found),
        html.section("To be read with it", *(html.paragraph(note) for note in NOTES)),
        html.section("Runs", html.facts(_facts(found))),
    ]
    style = "td:first-child{min-width:8.5em}td:nth-child(2){white-space:nowrap}figure+.scroll{margin-top:18px}"
    return str(html.page(f"one-weird-trick: {TITLE}", body, style=style))


def _headline(found: Found) -> list[tuple[str, str, str]]:
    first = found.traffic[0]
    equal = len(found.done) - len(found.unequal)
    batch = crossover(first.towers, first.workers)
    shown = "never" if batch is None else f"{batch:,.0f}"
    figures = [
        ("equal to one process", f"{equal} of {len(found.rows)}", f"within {CLAIMED:g}, in float64"),
        ("workers send less from batch", shown, f"{first.net}, two processes"),
    ]
    ratios = found.speed and found.speed.ratios("one-tower-pair", "one-tower-share")
    if ratios:
        figures.append(
            ("two workers", f"{sorted(ratios)[len(ratios) // 2]:.2f} x", "one process with half of the cores")
        )
    return figures


def _failures(found: Found) -> list[Markup]:
    """What failed or is not equal, before any figure."""
    rows = [[TITLES[row["variant"]], str(row["seed"]), row["reason"]] for row in found.failed]
    rows += [[TITLES[row["variant"]], str(row["seed"]), "not what one process does"] for row in found.unequal]
    rows += [["timing", "", "failed"]] if found.speed is None else []
    if not rows:
        return []
    told = html.paragraph("What failed is in no figure; the same command tries again.")
    return [html.section("Left out, or not equal", told, html.table(["processes", "seed", "why"], rows))]


def equality_words(found: Found) -> str:
    """What was compared, and what may be said of it."""
    if not found.done:
        return "Nothing could be compared."
    row = found.done[0]
    claim = (
        f"In float64 they are within {CLAIMED:g} of one process: the same up to rounding."
        if not found.unequal
        else f"In float64 some are NOT within {CLAIMED:g} of one process."
    )
    return (
        f"{pluralize(row['updates'], 'update')} of {row['batch_size']} training images, dropout and all, by gloo "
        "processes and by one process with the whole batch: the loss of every update, every gradient of the first, "
        f"every weight after the last. {claim} Below: the greatest difference of all seeds, as a share of the greatest "
        "number in its tensor. In float32 a rounding can change which way ReLU and pooling go, so it claims nothing."
    )


def equality_table(found: Found) -> list[list[str]]:
    """Rows under :data:`EQUAL_HEAD`."""
    table = []
    for name in WORLDS:
        seeds = sum(row["variant"] == name for row in found.done)
        for dtype in ("float64", "float32"):
            greatest = found.greatest(name, dtype)
            if greatest:
                table.append([TITLES[name], dtype, str(seeds), *(f"{greatest[what]:.1e}" for what in COMPARED)])
    return table


def _traffic(traffic: Sequence[Traffic]) -> list[Markup]:
    parts = []
    for each in traffic:
        table = html.table(traffic_head(), traffic_table(each), range(2, 2 + len(BATCHES)), sums=sum_rows(each))
        words = crossover_words(each)
        shown = html.figure(chart(each), f"{bytes_title(each)}. {words}") if each.world == 2 else html.paragraph(words)
        parts.append(html.section(bytes_title(each), shown, table))
    return parts


def bytes_title(each: Traffic) -> str:
    """Of a section."""
    name = next(title for name, title in TITLES.items() if WORLDS[name] == each.world)
    return f"Bytes a step, {each.net}, {name}"


def crossover_words(each: Traffic) -> str:
    """From which batch on which layout sends less."""
    batch = crossover(each.towers, each.workers)
    if batch is None:
        return "The two towers send less, whatever the batch."
    return f"Below a batch of {batch:,.0f} the two towers send less, above it the workers."


def traffic_head() -> list[str]:
    """Of :func:`traffic_table`: megabytes (1e6 bytes) by batch."""
    return ["MB a process", "at", *(f"{size:,}" for size in BATCHES)]


def traffic_table(each: Traffic) -> list[list[str]]:
    """Layer by layer, then their sum, for both layouts."""
    table = []
    for title, sent in (("two towers", each.towers), ("one weird trick", each.workers)):
        table += [[title, part.name, *(megabytes(part.leaving(size)) for size in BATCHES)] for part in sent]
        table.append([title, "in all", *(megabytes(total_bytes(sent, size)) for size in BATCHES)])
    return table


def sum_rows(each: Traffic) -> tuple[int, int]:
    """The sums of :func:`traffic_table`."""
    return len(each.towers), len(each.towers) + 1 + len(each.workers)


def megabytes(num_bytes: float) -> str:
    """1e6 bytes, to three digits."""
    return f"{num_bytes / 1e6:,.0f}" if num_bytes >= 100e6 else f"{num_bytes / 1e6:.3g}"


def chart(each: Traffic) -> Markup:
    """Bytes a step against the batch, both logarithmic."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    width, height = 560, 300
    with drawing(width, height) as figure:
        axes = figure.add_axes((0.1, 0.14, 0.7, 0.72))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lines: tuple[tuple[str, Sequence[Sent], str], ...] = (
            ("two towers", each.towers, "a"),
            ("one weird trick", each.workers, "b"),
        )
        for name, sent, color in lines:
            ys = [total_bytes(sent, size) / 1e6 for size in BATCHES]
            axes.plot(BATCHES, ys, color=COLORS[color], linewidth=1.8, clip_on=False, gid="line")
            axes.text(BATCHES[-1] * 1.15, ys[-1], name, size=12, color=COLORS[color], va="center")
        axes.xaxis.set_major_locator(FixedLocator(BATCHES))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.grid(axis="y", color=COLORS["hair"], linewidth=0.7, clip_on=False)
        plain_axes(axes)
        figure.text(0, 1 - 16 / height, "Sent by one process, MB a step", size=13.5, weight="bold")
        figure.text(0.8, 4 / height, "images a step", size=12, ha="right", color=COLORS["soft"])
        return inline_svg(figure, f"{bytes_title(each)}: {crossover_words(each)}")


def _speed(found: Found) -> list[Markup]:
    if found.speed is None:
        return []
    table = html.table(list(SPEED_HEAD), speed_table(found), range(2, 5))
    told = f"{speed_words(found)} {SPEED_NOTE}"
    return [html.section("Speed on this machine", table, html.paragraph(told))]


def speed_words(found: Found) -> str:
    """What was timed."""
    speed = found.speed
    assert speed is not None
    cores = pluralize(speed.cpus, "core")
    return (
        f"Whole steps with updates, batch {speed.batch_size}, fp32, {speed.device}, {cores} in all; median and range "
        f"of {pluralize(speed.rounds, 'round')}, in which all take turns; ratios are of the same round."
    )


def speed_table(found: Found) -> list[list[str]]:
    """Rows under :data:`SPEED_HEAD`."""
    assert found.speed is not None
    table = []
    for case, rates in found.speed.rates.items():
        net, _, how = case.rpartition("-")
        ratios = [found.speed.ratios(case, f"{net}-{other}") for other in ("share", "all")]
        shown = [
            "\u2013" if not each or case == f"{net}-{other}" else median_and_range(each, ".2f")
            for each, other in zip(ratios, ("share", "all"), strict=True)
        ]
        table.append([NETS[net], HOW[how], median_and_range(rates, ",.1f"), *shown])
    return table


def _facts(found: Found) -> list[tuple[str, str]]:
    return [
        ("Command", tables.command_words(ONE_WEIRD_TRICK, len(found.seeds))),
        ("Seeds", ", ".join(map(str, found.seeds))),
        ("Data set", tables.data_words(found.record.data, found.record.fingerprint)),
        *tables.made_with(found.speed.machine if found.speed else {}, "Machine of the timing"),
    ]


def markdown(found: Found) -> str:
    """``table.md``: everything that the page has in tables, for READMEs."""
    command = tables.command_words(ONE_WEIRD_TRICK, len(found.seeds))
    lines = [f"**{TITLE}**", "", f"`{command}`", "", equality_words(found), ""]
    lines += tables.markdown_table(EQUAL_HEAD, equality_table(found))
    for each in found.traffic:
        lines += [f"{bytes_title(each)}. {crossover_words(each)}", ""]
        lines += tables.markdown_table(traffic_head(), traffic_table(each))
    if found.speed:
        lines += [speed_words(found), "", *tables.markdown_table(SPEED_HEAD, speed_table(found)), SPEED_NOTE, ""]
    lines += [f"- failed, in no figure: {TITLES[row['variant']]}, seed {row['seed']}" for row in found.failed]
    return "\n".join([*lines, *(f"- {note}" for note in NOTES)]).rstrip() + "\n"


def bytes_csv(traffic: Sequence[Traffic]) -> str:
    """A row for every net, layout, number of processes, place and batch."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("net", "processes", "layout", "at", "batch_size", "bytes_in_ledger", "bytes_leaving"))
    for each in traffic:
        for layout, sent in (("two towers", each.towers), ("one weird trick", each.workers)):
            for part in sent:
                for size in BATCHES:
                    writer.writerow(
                        (
                            each.net,
                            each.world,
                            layout,
                            part.name,
                            size,
                            part.in_ledger(size),
                            f"{part.leaving(size):.0f}",
                        )
                    )
    return table.getvalue()


def to_json(found: Found) -> str:
    """The findings for machines."""
    content = {
        "experiment": "one-weird-trick",
        "comparisons": len(found.rows),
        "equal": len(found.done) - len(found.unequal),
        "failed": [[row["variant"], row["seed"]] for row in found.failed],
        "greatest": {
            f"{name}, {dtype}": found.greatest(name, dtype) for name in WORLDS for dtype in ("float64", "float32")
        },
        "crossover_batch": {
            f"{each.net}, {each.world} processes": crossover(each.towers, each.workers) for each in found.traffic
        },
        "speed": None if found.speed is None else dataclasses.asdict(found.speed),
    }
    return json.dumps(content, indent=1) + "\n"
