"""``bench.html``: a benchmark's result as one page that asks for nothing outside itself, in the style of a run's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trainer.bench import text
from trainer.bench.bottleneck import COMPUTATION, Bottleneck
from trainer.bench.prediction import Projection, costs_of, predict_rate
from trainer.bench.record import BenchRecord, coherent
from trainer.bench.text import number
from trainer.report import page as html
from trainer.report.charts import Axis, Line, line_chart

HERE = Path(__file__).parent
LABEL_SHARE = 0.075  # of the timeline's length: shorter spans carry no name
WHAT = {
    "read": "stored bytes copied out of the files, shuffled as in training",
    "decode": "images decoded, to the crops of training",
    "augment": "crop, mirror, mean, color, scale, labels",
    "transfer": "the batch brought into the net's memory layout",
    "forward": "from images to the loss, without the crossings",
    "exchange": "bytes between the towers, at conv3, fc6, fc7 and fc8, forward and backward",
    "waiting": "a tower that came to a crossing first waits for the other",
    "backward": "from the loss to the gradients, without the crossings",
    "check": "gradient norms, the control message before the update, and waiting for the slower tower there",
    "optimizer": "the update of the weights",
    "rest": "the loop around all that, with metrics",
    "conv3 forward": "and the other crossings: the parts of exchange and waiting, layer by layer; not to be added",
    "checkpoint": "one complete checkpoint written",
}
Bar = tuple[str, float, float, str, str, str]  # name, begin and length as shares, color, value, small print


@coherent()
def render(record: BenchRecord, found: Bottleneck, projections: Sequence[Projection] = ()) -> str:
    """The page as HTML text."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["number"] = number
    workload, predicted, costs = record.workload, predict_rate(record), costs_of(record)
    figures = [(name, f"{rate.images_per_s:,.0f}", "images/s") for name, rate in reversed(record.throughputs().items())]
    if record.end_to_end:
        small = f"images/s; measured {record.end_to_end.images_per_s / predicted:.2f} of it"
        figures.append(("predicted from the stages", f"{predicted:,.0f}", small))
    spent = [sum(stage.ms.median for stage in record.group(side).values()) for side in ("loader", "net")]
    longest_ms = max(record.training.ms.median, *spent) or 1.0
    sides = (
        ("loader", "The loader, a batch ahead", f"alone {number(costs.loader_ms)} ms per batch", "a"),
        ("net", "The net, at the same time", f"alone {number(costs.net_ms)} ms per step", "b"),
    )
    title = f"{workload.recipe.split(' (')[0]}: from disk to gradient"
    known = dict.fromkeys(("started", "command", "commit", "host", "processor", "python", "torch"), "")
    body = environment.from_string((HERE / "page.html.j2").read_text(encoding="utf-8")).render(
        record=record,
        workload=workload,
        environment=known | record.environment,
        title=title,
        about=text.about(record),
        figures=figures,
        doubt=found.doubt,
        found=found,
        tried=text.tried_sentence(record),
        advice=text.advice_sentence(record, found),
        lanes=[(head, alone, _bars(record, found, side, css, longest_ms)) for side, head, alone, css in sides],
        step_ms=record.training.ms.median,
        longest_ms=longest_ms,
        prediction=f"{text.prediction_sentence(record)} {text.share_sentence(record)}" if record.end_to_end else "",
        shares=[
            (stage.name, 0.0, share, _color(found, stage.name, "a"), text.percent(share), f"of {stage.ceiling}")
            for stage in record.stages
            if (share := stage.share_of_ceiling) is not None
        ],
        **_timeline(record),
        charts=_charts(record, projections),
        stages=(text.STAGE_HEAD, [text.stage_cells(stage) for stage in record.stages]),
        words=[(name, words) for name, words in WHAT.items() if record.stage(name)],
        ceilings=(text.CEILING_HEAD, text.ceiling_cells(record)),
    )
    return html.page(title, [body], style=(HERE / "bench.css").read_text(encoding="utf-8"))


def _color(found: Bottleneck, stage: str, css: str) -> str:
    return "limit" if found.is_at(stage) else css


def _bars(record: BenchRecord, found: Bottleneck, side: str, css: str, longest_ms: float) -> list[Bar]:
    """Every stage of one side begins where the one before it ends."""
    bars, begin = [], 0.0
    for name, stage in record.group(side).items():
        length, rate = stage.ms.median / longest_ms, f"{stage.images_per_s:,.0f} images/s" if stage.ms.median else ""
        bars.append((name, begin, length, _color(found, name, css), f"{number(stage.ms.median)} ms", rate))
        begin += length
    return bars


def _timeline(record: BenchRecord) -> dict[str, Any]:
    """One step, tower by tower, in percent; crossings lie on top of the forward and backward that they interrupt."""
    spans = [span for span in record.timeline if span.name != "step"]
    begin_ms = min((span.begin_ms for span in spans), default=0.0)
    length_ms = max((span.end_ms for span in spans), default=0.0) - begin_ms or 1.0
    towers: dict[str, list[tuple[str, float, float, str, str]]] = {span.tower: [] for span in spans}
    for span in sorted(spans, key=lambda span: " " in span.name):
        ms = span.end_ms - span.begin_ms
        css = "ink" if " " in span.name else {"forward": "a", "backward": "b"}.get(span.name, "soft")
        named = ms / length_ms > LABEL_SHARE and span.name not in COMPUTATION  # crossings cut those up
        place = (100 * (span.begin_ms - begin_ms) / length_ms, 100 * ms / length_ms)
        label = span.name.split(" ")[0] if named else ""
        towers[span.tower].append((css, *place, f"{span.name}, {number(ms)} ms", label))
    return {"towers": towers, "timeline_ms": length_ms}


def _charts(record: BenchRecord, projections: Sequence[Projection]) -> list[tuple[Markup, str, str]]:
    """Rate by batch size, and by processes, each with its caption."""
    axis = Axis("images/s", form="{:,.0f}".format, low=0.0)
    charts, lines = [], []
    if record.sweep:
        points = {record.workload.batch_size: record.training.images_per_s}
        points |= {size: figure.median for size, figure in record.sweep.items()}
        line = Line("measured", sorted(points), [points[size] for size in sorted(points)], "a")
        kind = "End to end" if record.end_to_end else "Training on synthetic images"
        chart = Markup(line_chart([line], axis, x_label="images per step"))
        charts.append((chart, "By batch size.", f"{kind}, medians."))
    caption = ""
    if projections:
        lines.append(Line("model", [p.processes for p in projections], [p.images_per_s for p in projections], "soft"))
        caption = (
            "Gray is a model, no measurement: computation, crossings and the averaging of gradients, added up from the "
            f"measured parts. It assumes that {text.MODEL}; {projections[0].basis}. --tower-link and --replica-link "
            "give every process a GPU of its own. Its formula is in docs/bench.md. "
        )
    if record.scaling:
        lines.append(Line("measured", list(record.scaling), [rate.median for rate in record.scaling.values()], "a"))
        caption += "Blue is training on synthetic images, measured here after all else."
    if lines:
        charts.append((Markup(line_chart(lines, axis, x_label="processes")), "By processes.", caption))
    return charts
