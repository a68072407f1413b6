"""``bench.html``: a benchmark's result as one page that asks for nothing outside itself, in the style of a run's."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from trainer.bench.bottleneck import COMPUTATION, Verdict
from trainer.bench.prediction import Projection, costs_of, predict_rate
from trainer.bench.record import BenchRecord, Point, Span, Stage
from trainer.bench.text import (
    advice_sentence,
    doubt_sentence,
    half_within,
    number,
    percent,
    prediction_sentence,
    share_sentence,
    stage_cells,
    wholes,
)
from trainer.report import page as html
from trainer.report.charts import Axis, Line, line_chart

STYLE = Path(__file__).with_name("bench.css").read_text(encoding="utf-8")
LABEL_SHARE = 0.075  # of the timeline's length: shorter spans carry no name
WHAT = {
    "read": "stored bytes copied out of the files, shuffled as in training",
    "decode": "pictures decoded, to the crops of training",
    "augment": "crop, mirror, mean, colour, scale, labels",
    "transfer": "the batch brought into the net's memory layout",
    "forward": "from pictures to the loss, without the crossings",
    "exchange": "bytes between the towers, at conv3, fc6, fc7 and fc8, forward and backward",
    "waiting": "a tower that came to a crossing first waits for the other",
    "backward": "from the loss to the gradients, without the crossings",
    "check": "gradient norms, the control message before the update, and waiting for the slower tower there",
    "optimizer": "the update of the weights",
    "rest": "the loop around all that, with metrics",
    "conv3 forward": "and the other crossings: the parts of exchange and waiting, layer by layer; not to be added",
    "checkpoint": "one whole checkpoint written",
}
CSS_OF = {"forward": "a", "backward": "b", "wait": "soft", "check": "soft", "optimizer": "soft", "transfer": "soft"}


def render(record: BenchRecord, verdict: Verdict, projections: Sequence[Projection] = ()) -> str:
    """The page as HTML text."""
    return html.page(
        f"{record.setting.recipe}: from disk to gradient",
        [
            _opening(record, verdict),
            _waterfall(record, verdict),
            _ceilings(record, verdict),
            _timeline(record),
            _curves(record, projections),
            _tables(record),
        ],
        style=STYLE,
    )


def _opening(record: BenchRecord, verdict: Verdict) -> str:
    """What was measured, the verdict, and the figures that matter most."""
    setting, environment = record.setting, record.environment
    count = "one process" if setting.processes == 1 else f"{setting.processes} processes, one a tower"
    about = (
        f"{setting.pictures}, batch {setting.batch_size}, {setting.precision}, {setting.device}, {count}, "
        f"{setting.cores} cores of {environment.get('processor', 'an unnamed processor')}"
    )
    figures = [(name, f"{whole.images_per_s:,.0f}", "images/s") for name, whole in reversed(wholes(record))]
    if record.whole:
        predicted = predict_rate(record)
        small = f"images/s; measured {record.whole.images_per_s / predicted:.2f} of it"
        figures.append(("predicted from the stages", f"{predicted:,.0f}", small))
    parts = [
        f'<p class="kicker">Benchmark, {escape(str(environment.get("started", "")))}</p>',
        f"<h1>{escape(setting.recipe.split(' (')[0])}: from disk to gradient</h1>",
        f'<p class="soft">{escape(about)}</p>',
        html.headline(figures),
        f'<p class="doubt">{escape(doubt)}</p>' if (doubt := doubt_sentence(record)) else "",
        f'<p class="lede">{escape(verdict.sentence)}</p>',
        _advice(record, verdict),
    ]
    return "\n".join(parts)


def _advice(record: BenchRecord, verdict: Verdict) -> str:
    """What would help, as a list."""
    if not verdict.suggestions:
        return html.paragraph("No change that this benchmark can compute promises 3 % or more.")
    items = "".join(
        f"<li><b>{escape(row.change)}</b>: {row.factor:.2f} times, {row.images_per_s:,.0f} images/s "
        f"<small>({escape(row.basis)})</small></li>"
        for row in verdict.suggestions
    )
    return f'<p>{escape(advice_sentence(record))}</p><ol class="advice">{items}</ol>'


def _is_limit(stage: Stage, verdict: Verdict) -> bool:
    return stage.name == verdict.limit or (verdict.limit == "computation" and stage.name in COMPUTATION)


def _waterfall(record: BenchRecord, verdict: Verdict) -> str:
    """Every stage begins where the one before it ends; loader and net run side by side."""
    whole = record.whole or record.synthetic
    lanes = [[stage for stage in record.stages if stage.group == group] for group in ("loader", "net")]
    longest = max([whole.ms.median, *(sum(stage.ms.median for stage in lane) for lane in lanes)]) or 1.0
    costs = costs_of(record)
    heads = (
        ("The loader, a batch ahead", f"alone {number(costs.loader_ms)} ms a batch"),
        ("The net, at the same time", f"alone {number(costs.net_ms)} ms a step"),
    )
    rows = []
    for (title, small), lane, css in zip(heads, lanes, ("a", "b"), strict=True):
        if not lane:
            continue
        rows.append(f'<div class="head">{title} <small>{small}</small></div>')
        begin = 0.0
        for stage in lane:
            colour = "limit" if _is_limit(stage, verdict) else css
            value = f"{number(stage.ms.median)} ms <small>{_rate(stage)}</small>"
            line = f'<div class="line" style="left:{100 * whole.ms.median / longest:.2f}%"></div>'
            bar = _bar(begin / longest, stage.ms.median / longest, colour)
            rows.append(_row(stage.name, bar + line, value, "limit" if colour == "limit" else ""))
            begin += stage.ms.median
    scale = f'<div class="scale"><span>0 ms</span><span>{number(longest)} ms</span></div>'
    rows.append(f"<div></div>{scale}<div></div>")
    what = "a step end to end, loader and net at once" if record.whole else "a step on synthetic pictures"
    colours = "Blue is the loader, ochre the net, red the limit" if record.loader else "Ochre is the net, red the limit"
    caption = (
        f"From disk to gradient. Milliseconds a batch of {record.setting.batch_size}, medians; each stage begins where "
        f"the one before it ends. {colours}. Small: the rate if there were only this stage. "
        f"The dashed line is {what}, {number(whole.ms.median)} ms; the stages are measured with loader and net each "
        "alone, so they need not end there. The loader prepares the next batch while the net trains, so the longer of "
        "the two sets the pace, or the processor time of both where they share cores."
    )
    sentences = (
        html.paragraph(f"{_upper(prediction_sentence(record))}. {_upper(share_sentence(record))}.")
        if record.whole
        else ""
    )
    return html.section(
        "Where the time goes", html.figure(f'<div class="bars">{"".join(rows)}</div>', caption), sentences
    )


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _rate(stage: Stage) -> str:
    return f"{stage.images_per_s:,.0f} images/s" if stage.ms.median > 0 else ""


def _row(name: str, track: str, value: str, css: str = "", *, full: bool = False) -> str:
    box = "track full" if full else "track"
    return (
        f'<div class="name {css}">{escape(name)}</div><div class="{box}">{track}</div>'
        f'<div class="value {css}">{value}</div>'
    )


def _bar(begin: float, length: float, css: str) -> str:
    return f'<div class="bar {css}" style="left:{100 * begin:.2f}%;width:{100 * min(length, 1.0):.2f}%"></div>'


def _ceilings(record: BenchRecord, verdict: Verdict) -> str:
    """Each stage as a share of what this machine can do at most."""
    rows = []
    for stage in record.stages:
        share = stage.share_of_ceiling
        if share is None:
            continue
        css = "limit" if _is_limit(stage, verdict) else ""
        value = f"{percent(share)} <small>of {escape(stage.ceiling)}</small>"
        rows.append(_row(stage.name, _bar(0.0, share, css or "a"), value, css, full=True))
    if not rows:
        return ""
    caption = (
        "Stages against ceilings. The full width is what this machine can do at most at that kind of work, measured in "
        "the same run; what is far below its ceiling spends its time on something else: many small pieces, waiting, "
        "Python. Above 100 % data that fit a processor's cache have beaten a ceiling measured without it. Red is the "
        "limit. Stages that no ceiling was found for have no bar; what each is held against is in docs/bench.md."
    )
    return html.section(
        "How near the machine's limits", html.figure(f'<div class="bars">{"".join(rows)}</div>', caption)
    )


def _timeline(record: BenchRecord) -> str:
    """One step, tower by tower, with what crosses between them."""
    spans = [span for span in record.timeline if span.name != "step"]
    if not spans:
        return ""
    begin, end = min(span.begin_ms for span in spans), max(span.end_ms for span in spans)
    lanes = []
    for tower in dict.fromkeys(span.tower for span in spans):
        name = "both towers" if tower == "both" else f"tower {tower}"
        lanes.append(f"<div>{name}</div>{_lane((s for s in spans if s.tower == tower), begin, end)}")
    scale = f'<div class="scale"><span>0 ms</span><span>{number(end - begin)} ms</span></div>'
    crossing = '<span class="ink"><i></i>crossing, with waiting</span>' if record.setting.processes > 1 else ""
    legend = (
        '<div class="legend"><span class="a"><i></i>forward</span><span class="b"><i></i>backward</span>'
        f'{crossing}<span class="soft"><i></i>waiting for the batch, transfer, check, optimizer</span></div>'
    )
    kind = "end to end" if record.whole else "on synthetic pictures"
    caption = (
        f"One step {kind}, the one of median length of those measured, by the clock in the training loop. Point at "
        "a part for its name and milliseconds."
    )
    if record.setting.processes > 1:
        caption += " What a tower spends in a crossing is the exchange and the waiting for the other tower."
    figure = html.figure(f'<div class="lanes">{"".join(lanes)}{scale}</div>{legend}', caption)
    return html.section("One step", figure)


def _lane(spans: Iterable[Span], begin: float, end: float) -> str:
    """A tower's spans; crossings lie on top of the forward and backward that they interrupt."""
    length = (end - begin) or 1.0
    parts = []
    for span in sorted(spans, key=lambda span: " " in span.name):
        share = (span.end_ms - span.begin_ms) / length
        css = "ink" if " " in span.name else CSS_OF.get(span.name, "soft")
        named = share > LABEL_SHARE and span.name not in COMPUTATION  # those are cut up by crossings, and in the legend
        label = escape(span.name.split(" ")[0]) if named else ""
        parts.append(
            f'<span class="{css}" style="left:{100 * (span.begin_ms - begin) / length:.3f}%;width:{100 * share:.3f}%" '
            f'title="{escape(span.name)}, {number(span.end_ms - span.begin_ms)} ms">{label}</span>'
        )
    return f'<div class="lane">{"".join(parts)}</div>'


def _curves(record: BenchRecord, projections: Sequence[Projection]) -> str:
    """Rate by batch size, and by processes."""
    axis = Axis("images/s", form="{:,.0f}".format, low=0.0)
    charts = []
    if record.sweep:
        whole = record.whole or record.synthetic
        own = Point(record.setting.batch_size, whole.images_per_s, whole.images_per_s, whole.images_per_s)
        points = sorted({own.x: own, **{point.x: point for point in record.sweep}}.values(), key=lambda point: point.x)
        line = Line("measured", [p.x for p in points], [p.images_per_s for p in points], "a")
        kind = "End to end" if record.whole else "Training on synthetic pictures"
        caption = f"By batch size. {kind}, medians."
        charts.append(html.figure(line_chart([line], axis, x_label="pictures a step"), caption))
    lines = []
    if projections:
        lines.append(Line("model", [p.processes for p in projections], [p.images_per_s for p in projections], "soft"))
    if record.scaling:
        lines.append(Line("measured", [p.x for p in record.scaling], [p.images_per_s for p in record.scaling], "a"))
    if lines:
        caption = (
            "By processes. Grey is a model, no measurement: computation, crossings and the averaging of gradients, "
            f"added up from the measured parts ({projections[0].basis if projections else ''}); --tower-link and "
            "--replica-link give every process a GPU of its own. Its formula is in docs/bench.md."
        )
        if record.scaling:
            caption += " Blue is training on synthetic pictures, measured here after all else."
        charts.append(html.figure(line_chart(lines, axis, x_label="processes"), caption))
    return html.section("More at a time", f'<div class="grid">{"".join(charts)}</div>') if charts else ""


def _tables(record: BenchRecord) -> str:
    """Every figure, and where it was measured."""
    head = ["stage", "ms a batch", "half within", "n", "processor ms", "images/s", "of its ceiling", ""]
    stages = html.table(head, [stage_cells(stage) for stage in record.stages], numbers=(1, 2, 3, 4, 5, 6))
    names = {stage.name for stage in record.stages}
    words = html.facts([(name, text) for name, text in WHAT.items() if name in names])
    how = html.paragraph(
        "Medians; half of the measurements lie within the quartiles given; n is how many there were, rounds or "
        "steps. Processor time is that of all threads of a process. How each is measured is in docs/bench.md."
    )
    rows = [
        [row.name, number(row.figure.median), half_within(row.figure), row.unit, str(row.figure.n), row.note]
        for row in record.ceilings
    ]
    ceilings = html.table(["ceiling", "median", "half within", "", "n", "how"], rows, numbers=(1, 2, 4))
    environment, setting = record.environment, record.setting
    cached = "" if setting.cached is None else f"{setting.cached:.0%} of its pages were in memory"
    facts = [
        ("Command", str(environment.get("command", ""))),
        ("Commit", str(environment.get("commit", ""))),
        ("Machine", f"{environment.get('host', '')}: {environment.get('processor', '')}, {setting.cores} cores"),
        ("GPUs", ", ".join(environment.get("gpus", []))),
        ("Data set", f"{setting.data} {cached}".strip()),
        ("Versions", f"Python {environment.get('python', '')}, torch {environment.get('torch', '')}"),
        ("Measured", f"{setting.rounds} rounds in turns, {setting.seconds:g} s of each; warm-up not counted"),
    ]
    return html.section("Every figure", how, stages, words, ceilings, html.facts(facts))
