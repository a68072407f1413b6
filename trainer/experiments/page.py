"""``report.html``, ``table.md`` and ``summary.json`` of an experiment: what was found, as one self-contained page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.manifest import write_atomic
from trainer.errors import RunError
from trainer.experiments import drawings, measures, tables
from trainer.experiments.folder import RECORD_NAME, Row, RunTask
from trainer.experiments.summary import Summary, summarize, to_json
from trainer.experiments.variants import Experiment
from trainer.report import page as html
from trainer.report.figures import kernel_sheet
from trainer.training import run_folder
from twotower.words import pluralize

HERE = Path(__file__).parent
PAGE_NAME, TABLE_NAME, SUMMARY_NAME = "report.html", "table.md", "summary.json"
SHEETS = 5  # seeds whose kernels are drawn; the figures are of all


def write_results(folder: Path, experiment: Experiment, tasks: Sequence[RunTask], rows: Sequence[Row]) -> Path:
    """Writes what was found so far.

    Returns:
        Path of the page.

    Raises:
        RunError: it cannot be written.
    """
    summary = summarize(experiment, tasks, rows)
    try:
        write_atomic(folder / SUMMARY_NAME, to_json(summary).encode())
        write_atomic(folder / TABLE_NAME, tables.markdown(summary).encode())
        write_atomic(folder / PAGE_NAME, render(folder, summary).encode())
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from None
    return folder / PAGE_NAME


def render(folder: Path, summary: Summary) -> str:
    """The page as HTML text."""
    experiment = summary.experiment
    body = [
        html.header(f"twotower, experiment {experiment.name}", experiment.title, experiment.question),
        html.headline(_headline(summary)),
        *_failures(summary),
        *_extra(summary),
        *_differences(summary),
        *_values(summary),
        *_curves(summary),
        html.section(
            "To be read with it", *(html.paragraph(note) for note in (*experiment.notes, *_left_out(summary)))
        ),
        html.section("Runs", html.facts(_facts(folder, summary)), _rows(summary)),
    ]
    style = (HERE / "experiment.css").read_text(encoding="utf-8")
    return str(html.page(f"{experiment.name}: {experiment.title}", body, style=style))


def _headline(summary: Summary) -> list[tuple[str, str, str]]:
    seeds = sorted({task.seed for task in summary.tasks})
    missing = len(summary.tasks) - summary.num_done - len(summary.failed)
    small = f"{len(summary.failed)} failed, {missing} not run yet" if summary.failed or missing else "all of them"
    return [
        ("runs", f"{summary.num_done} of {len(summary.tasks)}", small),
        ("variants", str(len(summary.experiment.variants)), pluralize(len(seeds), "seed") + " each"),
        ("differences seen", str(sum(each.found.is_claim for each in summary.compared)), _of_compared(summary)),
    ]


def _of_compared(summary: Summary) -> str:
    number = pluralize(len(summary.compared), "comparison")
    return f"of {number}: the 95 % interval does not span zero" if summary.compared else "nothing is compared"


def _failures(summary: Summary) -> list[Markup]:
    """Runs that are in no figure, before any figure."""
    if not summary.failed:
        return []
    rows = [[row["variant"], str(row["seed"]), str(row["exit_code"]), row["reason"]] for row in summary.failed]
    told = html.paragraph(
        "These runs failed. They are in no average, and their seeds in no pair; the same command tries again."
    )
    return [html.section("Left out", told, html.table(["variant", "seed", "exit code", "why"], rows))]


def _differences(summary: Summary) -> list[Markup]:
    """For each figure the chart and the table of the comparisons."""
    parts = []
    for metric in summary.experiment.metrics:
        compared = summary.of_metric(metric)
        if not compared:
            continue
        caption = (
            "Paired by seed. A tick a seed, a dot for the mean, a bar for its 95 % interval by Student's t. Gray where "
            "the interval spans zero."
        )
        table = html.table(
            list(tables.COMPARED_HEAD), [tables.compared_cells(each) for each in compared], tables.NUMBERS
        )
        parts.append(
            html.section(
                metric.title[0].upper() + metric.title[1:], html.figure(drawings.differences(compared), caption), table
            )
        )
    if parts:
        words = (
            "Visible from: a mean difference smaller than this would not be told from zero with these seeds, spread "
            "as they are. Same sign: seeds whose difference has the sign of the mean. The bootstrap resamples seeds. "
            "With few of them its interval is too narrow, so that of t decides. The paper's figures are of its own "
            "data set."
        )
        parts.append(html.paragraph(words))
    return parts


def _extra(summary: Summary) -> list[Markup]:
    """What only some experiments have."""
    found = []
    for title, head, rows in (
        ("Within each run", tables.GAINS_HEAD, tables.gains_table(summary)),
        ("The quickest of each", tables.LEVELS_HEAD, tables.levels_table(summary)),
        ("Several nets averaged", tables.AVERAGES_HEAD, tables.averages_table(summary)),
    ):
        if rows:
            found.append(html.section(title, html.table(list(head), rows, range(1, len(head)))))
    if summary.averages:
        words = "There is one average of all seeds' nets, so it has no interval over seeds."
        found.append(html.paragraph(words))
    if summary.experiment.measure == "color":
        found += _kernels(summary)
    if summary.experiment.measure == "neighbors":
        found += _neighbors(summary)
    return found


def _done(summary: Summary) -> list[RunTask]:
    done = {(row["variant"], row["seed"]) for row in summary.rows if row["status"] == "ok"}
    return [task for task in summary.tasks if (task.variant, task.seed) in done]


def _kernels(summary: Summary) -> list[Markup]:
    """conv1's kernels of both towers, seed by seed."""
    table = html.table(list(tables.COLOR_HEAD), tables.color_table(summary), range(1, len(tables.COLOR_HEAD)))
    parts = [html.section("Color, seed by seed", table)]
    by_key = {(row["variant"], row["seed"]): row for row in summary.rows}
    for variant in summary.experiment.variants:
        figures = []
        for task in [task for task in _done(summary) if task.variant == variant.name][:SHEETS]:
            arrays, row = measures.load(task.measured), by_key[task.variant, task.seed]
            for tower in "ab":
                if f"kernels_{tower}" in arrays:
                    share = 100 * row[f"color_{tower}"]
                    caption = f"Seed {task.seed}, tower {tower}. {share:.1f} % of the energy is color"
                    figures.append(html.figure(_sheet(arrays[f"kernels_{tower}"]), caption))
        if figures:
            grid = Markup('<div class="kernels">{}</div>').format(Markup("\n".join(figures)))
            parts.append(html.section(f"Kernels of conv1: {variant.title}", grid))
    return parts


def _sheet(weight: Any) -> Markup:
    sheet = kernel_sheet(weight, kernel_px=44)
    return Markup('<img class="sheet" alt="kernels of conv1" src="{}">').format(html.image_address(sheet))


def _neighbors(summary: Summary) -> list[Markup]:
    """Test images, their likeliest classes, and what is nearest to them by fc7, of the first run."""
    for task in _done(summary):
        arrays = measures.load(task.measured)
        if "words" not in arrays:
            continue
        words = json.loads(str(arrays["words"]))
        items = [
            _neighborhood(*each)
            for each in zip(arrays["asked"], words["titles"], words["classes"], arrays["nearest"], strict=True)
        ]
        grid = Markup('<ol class="alike">{}</ol>').format(Markup("\n".join(items)))
        first = pluralize(len(items), "test image")
        told = f"The first {first}, no selection; training images, nearest first. Seed {task.seed}."
        return [html.section("Test images and their nearest neighbors", html.paragraph(told), grid)]
    return []


def _neighborhood(image: Any, title: str, classes: Sequence[tuple[str, float]], nearest: Any) -> Markup:
    """One test image: with its true class, the likeliest classes as bars, and its neighbors."""
    bars = [
        Markup('<li{}><span>{}</span><i style="width:{:.1f}%"></i><b>{}</b></li>').format(
            Markup(' class="true"') if name == title else "", name, 100 * share, html.percent(share)
        )
        for name, share in classes
    ]
    return Markup(
        '<li><figure>{}<figcaption>{}</figcaption></figure><ol class="shares">{}</ol><div class="nearest">{}</div></li>'
    ).format(
        _picture(image, title),
        title,
        Markup("".join(bars)),
        Markup("").join(_picture(each, "neighbor") for each in nearest),
    )


def _picture(image: Any, alt: str) -> Markup:
    exact = Markup(' class="exact"') if html.is_small(image) else ""
    return Markup('<img{} alt="{}" src="{}">').format(exact, alt, html.image_address(np.ascontiguousarray(image)))


def _values(summary: Summary) -> list[Markup]:
    head, rows = tables.values_table(summary)
    told = html.paragraph("Mean over the runs that ended, and their range.")
    return [html.section("Figures by variant", told, html.table(head, rows, range(1, len(head))))]


def _curves(summary: Summary) -> list[Markup]:
    charts = drawings.curves(summary)
    figures = [html.figure(chart, caption) for chart, caption in charts if chart]
    if not figures:
        return []
    grid = Markup('<div class="grid">{}</div>').format(Markup("\n".join(figures)))
    told = html.paragraph("The mean over the seeds, and the range from the best to the worst of them.")
    return [html.section("Error against epochs", told, grid)]


def _left_out(summary: Summary) -> list[str]:
    return [f"Left out, {sentence}." for sentence in summary.experiment.left_out]


def _facts(folder: Path, summary: Summary) -> list[tuple[str, str]]:
    """With what the runs were made, as they say."""
    done, seeds = _done(summary), sorted({task.seed for task in summary.tasks})
    environment = run_folder.read_environment(done[0].run) if done else {}
    times = [float(run_folder.read_result(task.run).get("elapsed_s", 0)) for task in done]
    record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8")) if (folder / RECORD_NAME).exists() else {}
    minutes = f"{sum(times) / 60:.1f} min in all, {min(times) / 60:.1f} to {max(times) / 60:.1f} a run" if times else ""
    return [
        ("Command", tables.command_words(summary.experiment.name, len(seeds))),
        ("Seeds", ", ".join(map(str, seeds))),
        (
            "Data set",
            tables.data_words(str(record.get("data", "")), str(record.get("fingerprint", ""))) if record else "",
        ),
        ("Training time", minutes),
        *tables.made_with(environment, "Machine of the first run"),
    ]


def _rows(summary: Summary) -> Markup:
    """Every run, in a part that is folded away."""
    metrics = summary.experiment.metrics
    cells = [
        [
            row["variant"],
            str(row["seed"]),
            row["status"],
            *(metric.show(row.get(metric.key)) for metric in metrics),
        ]
        for row in summary.rows
    ]
    head = ["variant", "seed", "", *(metric.title for metric in metrics)]
    return Markup("<details><summary>Every run</summary>{}</details>").format(
        html.table(head, cells, range(3, len(head)))
    )
