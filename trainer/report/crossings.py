"""What crossed between the towers: the drawing of the net, and the ledger of a step as a table."""

from collections.abc import Sequence
from typing import Any

from trainer.report import page as html
from trainer.report.net_drawing import crossings_of, layer_rows
from trainer.report.run_data import RunRecord
from trainer.report.svg import Crossing, draw_towers, format_bytes

CAPTION = (
    "The net. Lines between the towers are as wide as the bytes that cross there; "
    "no other maps or gradients pass between them."
)


def towers(run: RunRecord) -> str:
    """The two towers with what crossed, and the ledger as a table."""
    if run.config is None:
        return html.section(
            "What crosses between the towers", html.missing("No drawing: the run folder has no config.toml.")
        )
    model, ledger = run.config.model, run.result.get("ledger") or []
    pairs = max(1, run.result.get("processes", 0) // 2)  # the ledger is that of the first pair
    batch, rows = run.config.train.batch_size // pairs, layer_rows(model)
    measured = _crossings_in(ledger, batch, crossings_of(model))
    crossings, note = (
        (
            measured,
            f"Bytes an image, forward, as counted in a step of {batch}. Gradients go back the same ways, reversed.",
        )
        if measured
        else (
            crossings_of(model),
            "Bytes an image, forward, in fp32, if each tower had its process. Gradients go back the same ways.",
        )
    )
    drawing = draw_towers(
        rows, crossings, image=f"{model.image_px}x{model.image_px}x{model.channels}", note=note, towers=model.towers
    )
    beside = _ledger(ledger, batch) if ledger else html.missing(_why_no_ledger(run))
    compare = _against_all_reduce(crossings, rows, batch)
    left = html.figure(drawing, CAPTION)
    return html.section(
        "What crosses between the towers", f'<div class="towers-and-ledger">{left}<div>{beside}{compare}</div></div>'
    )


def _why_no_ledger(run: RunRecord) -> str:
    if run.config is not None and run.config.model.towers == 1:
        return "No ledger: this net has one tower, so nothing crosses."
    if run.result.get("processes") == 1:
        return "No ledger: one process held both towers, so nothing crossed between processes."
    if run.result:
        return "No ledger: the process that ended the run took no step."
    return "No ledger yet: it is written when the run ends."


def _crossings_in(ledger: Sequence[dict[str, Any]], batch: int, planned: Sequence[Crossing]) -> list[Crossing]:
    """The forward crossings of a ledger, an image; [] where it holds none."""
    found: dict[tuple[str, str], float] = {}
    for row in ledger:
        if row["kind"] == "crossing" and row["phase"] == "forward":
            key = (row["name"], row["direction"])
            found[key] = found.get(key, 0) + row["bytes"] / batch
    elements = {crossing.layer: crossing.elements for crossing in planned}
    names = dict.fromkeys(name for name, _ in found)
    return [
        Crossing(name, elements.get(name, 0), round(found.get((name, "a->b"), 0)), round(found.get((name, "b->a"), 0)))
        for name in names
    ]


def _ledger(ledger: Sequence[dict[str, Any]], batch: int) -> str:
    """The exchange ledger of one step: a row a place and phase, totals by kind."""
    table: dict[tuple[str, str, str], dict[str, int]] = {}
    totals: dict[str, int] = {}
    for row in ledger:
        way = row["direction"]
        name = row["name"]
        if way[0] == way[-1]:  # a->a: what tower a sends to itself in other replicas
            name, way = f"{name}, between replicas", {"a": "a->b", "b": "b->a"}[way[0]]
        cell = table.setdefault((row["kind"], name, row["phase"]), {})
        cell[way] = cell.get(way, 0) + row["bytes"]
        totals[row["kind"]] = totals.get(row["kind"], 0) + row["bytes"]
    rows = [
        [name, phase, *(f"{cell[way]:,}" if way in cell else "\u2013" for way in ("a->b", "b->a"))]
        for (_, name, phase), cell in table.items()
    ]
    sums = range(len(rows), len(rows) + len(totals))
    rows += [[f"all {kind}", "", "", f"{total:,}"] for kind, total in totals.items()]
    replicas = any(row["kind"] == "replica" for row in ledger)
    head = ["what", "phase", *(("sent by a", "sent by b") if replicas else ("a \u2192 b", "b \u2192 a"))]
    whose = "of the first pair of towers, " if replicas else ""
    caption = html.paragraph(f"The ledger of one training step of {batch} pictures, {whose}in bytes:")
    return caption + html.table(head, rows, numbers=(2, 3), sums=tuple(sums))


def _against_all_reduce(crossings: Sequence[Crossing], rows: Sequence[Any], batch: int) -> str:
    """How much that is, beside the other way to use two devices."""
    if not crossings:
        return ""
    moved_an_image = 2 * sum(c.bytes_a_to_b + c.bytes_b_to_a for c in crossings)  # forward and backward
    alone = {c.layer for c in crossings if not c.bytes_a_to_b}
    parameters = sum(row.parameters * (1 if row.name in alone else 2) for row in rows)
    return html.paragraph(
        f"A step moves {format_bytes(batch * moved_an_image)} between two processes that hold a tower each, both ways "
        f"together. Two replicas of this net ({parameters:,} parameters) that average their gradients in fp32 would "
        f"move {format_bytes(8 * parameters)}, whatever the batch: towers move less below a batch of "
        f"{8 * parameters / moved_an_image:,.0f}."
    )
