"""The tables of an experiment as text cells, for the page and for a README."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.experiments.drawings import against_words
from trainer.experiments.paired import Comparison, Interval
from trainer.experiments.summary import Compared, Summary
from trainer.experiments.variants import Metric
from twotower.words import pluralize

DASH = "\u2013"
COMPARED_HEAD = (
    *("variant", "seeds", "difference", "95 % interval (t)", "bootstrap", "same sign", "visible from", "seen here"),
    "paper",
)
NUMBERS = range(1, 7)  # columns that are set as numbers


def interval_text(found: Interval | None, metric: Metric) -> str:
    """An interval as text; a dash for none."""
    return DASH if found is None else f"{metric.show(found.low, sign=True)} to {metric.show(found.high, sign=True)}"


def verdict(found: Comparison) -> str:
    """What may be said of a difference: nothing where the interval spans zero."""
    if found.interval is None:
        one = "one seed only" if len(found.seeds) == 1 else "all seeds alike"
        return f"no interval: {one}"
    if found.interval.spans_zero:
        return "no difference seen"
    return "higher" if found.mean > 0 else "lower"


def compared_cells(each: Compared) -> list[str]:
    """A row under :data:`COMPARED_HEAD`."""
    found, metric = each.found, each.metric
    lost = f" ({len(found.unpaired)} missing)" if found.unpaired else ""
    paper = each.variant.paper if metric.key in ("top1_error", "epochs_to_25") else None
    visible = found.smallest_visible
    return [
        each.variant.title,
        f"{len(found.seeds)}{lost}",
        metric.show(found.mean, sign=True),
        interval_text(found.interval, metric),
        interval_text(found.bootstrap, metric),
        f"{found.agree} of {len(found.seeds)}",
        DASH if visible is None else f"\u00b1{metric.show(visible)}",
        verdict(found),
        DASH if paper is None else str(paper),
    ]


def values_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Mean and range of every figure by variant; failed runs are counted, and in no figure."""
    metrics = [
        metric
        for metric in summary.experiment.metrics
        if any(summary.values(variant, metric) for variant in summary.experiment.variants)
    ]
    table = []
    for variant in summary.experiment.variants:
        ended = [row for row in summary.rows if row["variant"] == variant.name]
        failed = sum(row["status"] != "ok" for row in ended)
        cells = [variant.title, f"{len(ended) - failed}" + (f", {failed} failed" if failed else "")]
        table.append([*cells, *(mean_and_range(summary.values(variant, metric), metric) for metric in metrics)])
    return ["variant", "runs", *(metric.title for metric in metrics)], table


def mean_and_range(values: Sequence[float], metric: Metric) -> str:
    """``9.12 (8.90 to 9.31)``; how many where some runs have no value is the reader's to see in the rows."""
    if not values:
        return DASH
    mean = metric.show(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({metric.show(min(values))} to {metric.show(max(values))})"


def gains_table(summary: Summary) -> list[list[str]]:
    """Differences that are measured within a run: mean, interval and sign over the seeds."""
    table = []
    for metric in summary.experiment.metrics:
        if not metric.key.endswith("_gain"):
            continue
        for variant in summary.experiment.variants:
            values = summary.values(variant, metric)
            if values:
                mean = sum(values) / len(values)
                agree = sum(value * mean > 0 for value in values)
                interval = summary.interval(variant, metric)
                cells = [metric.show(mean, sign=True), interval_text(interval, metric), f"{agree} of {len(values)}"]
                table.append([metric.title, *cells])
    return table


GAINS_HEAD = ("difference", "mean", "95 % interval (t)", "same sign")
COLOR_HEAD = ("variant", "seed", "tower a, %", "tower b, %", "difference", "random halves that differ as much, %")
LEVELS_HEAD = ("training error", "quickest ReLU, epochs", "quickest tanh, epochs", "tanh / ReLU", "paper")
AVERAGES_HEAD = ("views", "nets", "one net, top-1 %", "averaged, top-1 %", "one net, top-5 %", "averaged, top-5 %")


def levels_table(summary: Summary) -> list[list[str]]:
    """Figure 1: the quickest rate of each activation."""
    table = []
    for level in summary.levels:
        sides = [DASH if side is None else f"{side[1]:.2f} ({side[0].title})" for side in (level.relu, level.tanh)]
        ratio = DASH if level.ratio is None else f"{level.ratio:.2f}"
        paper = "6 (CIFAR-10, four layers)" if level.level == 0.25 else DASH
        table.append([f"{level.level:.0%}".replace("%", " %"), *sides, ratio, paper])
    return table


def color_table(summary: Summary) -> list[list[str]]:
    """Figure 3: every run by itself, for the paper speaks of every run."""
    table = []
    for row in summary.rows:
        if row["status"] == "ok":
            found = [_percent(row[key]) for key in ("color_a", "color_b", "color_gap", "gap_by_chance")]
            table.append([summary.experiment.variant(row["variant"]).title, str(row["seed"]), *found])
    return table


def averages_table(summary: Summary) -> list[list[str]]:
    """Views: the average of several nets."""
    table = []
    for each in summary.averages:
        cells = [{"center": "center", "ten": "ten"}[each.views], str(len(each.seeds))]
        for count in ("top1", "top5"):
            cells += [_percent(each.single[count]), _percent(each.together[count])]
        table.append(cells)
    return table


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.2f}"


def markdown(summary: Summary) -> str:
    """``table.md``: everything that the page has in tables, for READMEs."""
    experiment = summary.experiment
    lines = [f"**{experiment.title}** ({pluralize(summary.num_done, 'run')} of {len(summary.tasks)})", ""]
    command = command_words(experiment.name, len({task.seed for task in summary.tasks}))
    lines += [f"`{command}`", "", *markdown_table(*values_table(summary))]
    for metric in experiment.metrics:
        compared = summary.of_metric(metric)
        if compared:
            rows = [compared_cells(each) for each in compared]
            lines += [f"{metric.title}: difference from {against_words(compared)}, paired by seed", ""]
            lines += markdown_table(list(COMPARED_HEAD), rows)
    for head, rows in (
        (GAINS_HEAD, gains_table(summary)),
        (LEVELS_HEAD, levels_table(summary)),
        (AVERAGES_HEAD, averages_table(summary)),
        (COLOR_HEAD, color_table(summary) if experiment.measure == "color" else []),
    ):
        if rows:
            lines += markdown_table(list(head), rows)
    failed = [
        f"- failed, in no figure: {row['variant']}, seed {row['seed']}: {row['reason']}" for row in summary.failed
    ]
    notes = [f"- {note}" for note in (*experiment.left_out, *experiment.notes)]
    return "\n".join([*lines, *failed, *notes]).rstrip() + "\n"


def command_words(name: str, seeds: int) -> str:
    """The command that makes such an experiment again; recipe and data set stand in words."""
    return f"python -m trainer experiment {name} --config RECIPE --data DIR --output FOLDER --seeds {seeds}"


def data_words(data: str, fingerprint: str) -> str:
    """A data set by its folder's name and its fingerprint."""
    return f"{Path(data).name} ({fingerprint[:12]})"


def made_with(environment: Mapping[str, Any], machine: str) -> list[tuple[str, str]]:
    """Facts about a machine, headed ``machine``, and its software, out of an environment.json."""
    cores = f", {pluralize(int(environment['cores']), 'core')}" if environment.get("cores") else ""
    versions = (f"{name} {environment[name]}" for name in ("python", "torch") if environment.get(name))
    return [
        (machine, f"{environment.get('processor', '')}{cores}"),
        ("Commit", str(environment.get("commit", ""))),
        ("Versions", ", ".join(versions)),
    ]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, and an empty one."""
    cells = [[text.replace("|", "\\|") for text in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]
