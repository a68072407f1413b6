"""The parts of the report, in their order on the page: each takes the run's record and gives HTML."""

import collections
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from trainer.report import page as html
from trainer.report.charts import confusion_chart
from trainer.report.images import SMALL_PX, PictureRow, PictureSet, colour_share, kernel_sheet, picture_address
from trainer.report.run_data import RunRecord

FIGURE_3 = (
    "In figure 3 of the paper tower a's kernels came out mostly colour-agnostic and tower b's mostly colour-specific, "
    '"during every run".'
)


def opening(run: RunRecord, data: str) -> str:
    """Title, one sentence, the large figures, and where they were made."""
    return (
        f'<header><p class="kicker">twotower, report of a run</p><h1>{escape(run.folder.resolve().name)}</h1>'
        f'<p class="lede">{escape(_lede(run))}</p></header>'
        + html.headline(_headline(run))
        + html.facts(_facts(run, data))
    )


def _lede(run: RunRecord) -> str:
    """How the run stands, in one sentence."""
    result = run.result
    if not run.steps:
        return "No step has finished yet."
    reason = result.get("exit_reason")
    done = f"{run.last_step:,} steps" + (f" of batch {result['batch_size']}" if result.get("batch_size") else "")
    processes = result.get("processes", 0)
    where = {1: " with both towers in one process", 2: " with one tower in each of two processes"}.get(
        processes, f" by {processes // 2} pairs of towers, a process each" if processes > 2 else ""
    )
    ending = {
        None: "The run has not ended: this is how far it has come.",
        "finished": "It ran to the end of its recipe.",
        "stopped": f"It was stopped early{_because(result)}, and can be resumed.",
        "failed": f"It failed{_because(result)}.",
    }.get(reason, f"It ended: {reason}.")
    return f"AlexNet in two towers, trained for {done}{where}. {ending}"


def _because(result: dict[str, Any]) -> str:
    return f" ({result['reason'].rstrip('.')})" if result.get("reason") else ""


def _headline(run: RunRecord) -> list[tuple[str, str, str]]:
    accuracy, result = run.accuracy, run.result
    rows = []
    if accuracy:
        count = int(accuracy["num_samples"])
        for name, key in (("top-1, held out", "top1"), ("top-5, held out", "top5")):
            right = round(accuracy[key] * count)
            small = f"{right:,} of {count:,} pictures" + (
                f"; 95 % interval {interval(right, count)}" if key == "top1" else ""
            )
            rows.append((name, f"{100 * accuracy[key]:.2f} %", small))
    else:
        rows.append(("top-1, held out", "\u2013", "not evaluated yet"))
    if run.images_per_s:
        rows.append(("throughput, median", f"{run.images_per_s:,.0f}", "images/s"))
    epochs = result.get("epoch")
    rows.append(("steps", f"{run.last_step:,}", f"{epochs:.4g} epochs" if epochs else "finished so far"))
    rows += _wall_time(run)
    return rows


def _wall_time(run: RunRecord) -> list[tuple[str, str, str]]:
    """Minutes of the process that ended the run; of the steps alone where the run was resumed, as only they add up."""
    rates, batch = run.column("images_per_s"), run.result.get("batch_size")
    steps_s = float((batch / rates[rates > 0]).sum()) if batch else 0.0
    whole_s = run.result.get("elapsed_s") or 0.0
    if not max(whole_s, steps_s):
        return []
    minutes = max(whole_s, steps_s) / 60
    small = "minutes, evaluation included" if whole_s > steps_s else "minutes in steps, over several starts"
    return [("wall time", f"{minutes:.1f}" if minutes < 100 else f"{minutes:,.0f}", small)]


def interval(right: int, count: int) -> str:
    """Wilson's 95 % interval of a share, in percent."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return f"{100 * (middle - half):.1f} to {100 * (middle + half):.1f} %"


def _facts(run: RunRecord, data: str) -> list[tuple[str, str]]:
    found = run.environment
    cores = f", {found['cores']} cores" if found.get("cores") else ""
    gpus = collections.Counter(found.get("gpus") or [])
    devices = ", ".join(f"{count} \u00d7 {name}" for name, count in gpus.items()) or "no GPU"
    machine = "; ".join(filter(None, (f"{found.get('processor', 'unknown')}{cores}", devices, found.get("system"))))
    known = {"command", "commit", "python", "torch", "system", "processor", "cores", "gpus", "started", "data"}
    rows = [
        ("Machine", machine if found else "not recorded"),
        ("Commit", str(found.get("commit", ""))),
        ("Versions", ", ".join(f"{name} {found[name]}" for name in ("python", "torch") if found.get(name))),
        ("Data set", data or str(found.get("data", ""))),
        ("Started", str(found.get("started", ""))),
        ("Command", str(found.get("command", ""))),
    ]
    return rows + [(key.replace("_", " "), str(value)) for key, value in found.items() if key not in known]


def kernels(run: RunRecord) -> str:
    """conv1 of both towers beside each other."""
    if not run.kernels:
        return html.section("What conv1 learned", html.missing("No kernels: the run has no checkpoint yet."))
    sheets = []
    for tower, weight in run.kernels.items():
        maps, channels, side, _ = weight.shape
        colour = (
            f"; {100 * colour_share(weight):.0f} % of the median kernel's energy is colour" if channels == 3 else ""
        )
        image = picture_address(kernel_sheet(weight))
        sheets.append(
            f'<figure><h3 class="t{tower}">tower {tower}</h3>'
            f'<img class="sheet" alt="conv1 kernels, tower {tower}" src="{image}">'
            f"<figcaption>{maps} kernels of {side} \u00d7 {side} \u00d7 {channels}{colour}.</figcaption></figure>"
        )
    several = len(run.kernels) > 1 and next(iter(run.kernels.values())).shape[1] == 3
    text = f"Weights after step {run.kernels_step:,}, each kernel on its own scale; middle gray is zero."
    return html.section(
        "What conv1 learned",
        html.paragraph(f"{text} {FIGURE_3 if several else ''}".strip()),
        f'<div class="sheets">{"".join(sheets)}</div>',
    )


def pictures(found: PictureSet | None, why_not: str) -> str:
    """Test pictures with their predictions, the wrong ones, and which class was taken for which."""
    if found is None:
        return html.section("Held-out pictures", html.missing(why_not))
    count, total = found.num_samples, found.num_in_split
    which = f"all {count:,}" if count == total else f"the first {count:,} of {total:,}"
    parts = [
        html.paragraph(
            f"The newest checkpoint, run over {which} pictures: {count - found.num_wrong:,} right, "
            f"{found.num_wrong:,} wrong. "
            "Under each picture its class and the net's confidence; where it is wrong, what it was taken for."
        ),
        _picture_grid(f"The first {len(found.first)}, not selected", found.first),
    ]
    if found.wrong:
        head = f"The {len(found.wrong)} most confident of {found.num_wrong:,} mistakes"
        parts.append(_picture_grid(head if found.num_wrong > len(found.wrong) else "Every mistake", found.wrong))
    if found.confusion is not None:
        caption = f"Confusion. Rows are the true class, columns the predicted one; {count:,} pictures."
        chart = html.figure(confusion_chart(found.confusion, found.classes), caption)
        parts.append(f'<div class="confusion-figure">{chart}</div>')
    return html.section("Held-out pictures", *parts)


def _picture_grid(head: str, rows: Sequence[PictureRow]) -> str:
    items = []
    for row in rows:
        exact = ' class="exact"' if max(row.image.shape[:2]) <= SMALL_PX else ""
        said = f'<span class="wrong">taken for {escape(row.predicted)}</span><br>' if row.wrong else ""
        items.append(
            f'<li class="{"miss" if row.wrong else "hit"}">'
            f'<img{exact} alt="{escape(row.label, quote=True)}" src="{picture_address(row.image)}">'
            f'{escape(row.label)}<br>{said}<span class="soft">{100 * row.confidence:.1f} %</span></li>'
        )
    return f'<h3 class="pictures-head">{escape(head)}</h3><ul class="pictures">{"".join(items)}</ul>'


def files(run: RunRecord) -> str:
    """The files of the run, and its recipe."""
    about = {
        "config.toml": "the resolved recipe: the run can be repeated from it alone",
        "environment.json": "commit, versions, machine",
        "metrics.jsonl": f"{len(run.steps):,} steps and {len(run.evaluations):,} evaluations, one JSON object a line",
        "result.json": "final figures and how the run ended",
        "tensorboard": "the same curves: tensorboard --logdir RUN/tensorboard",
        "checkpoints": "weights and velocities, one safetensors file a tower",
    }
    rows = [(name, what) for name, what in about.items() if (run.folder / name).exists()]
    recipe = (
        f"<details><summary>The recipe, config.toml</summary><pre>{escape(run.config_text)}</pre></details>"
        if run.config_text
        else ""
    )
    return html.section("Files", html.links(rows), recipe)
