"""Puts what the towers measured together into one record. Pure: no clock, no torch."""

import dataclasses
from typing import TYPE_CHECKING, Any

from trainer.bench.record import FEWER, BenchRecord, Ceiling, Figure, Point, Setting, Stage, Whole
from trainer.config import ModelConfig
from trainer.planning.describe import count_layers

if TYPE_CHECKING:
    from trainer.bench.stages import Part

FLOAT_BYTES = 4
OPTIMIZER_PASSES = 5  # weights, gradients and velocities read, weights and velocities written


@dataclasses.dataclass(frozen=True)
class Work:
    """What one batch asks of tower a, counted from the recipe.

    Attributes:
        forward_flop, backward_flop: of matrix products and convolutions.
        pixel_bytes: of one float32 batch as the net gets it.
        parameters: that tower a's process holds.
    """

    forward_flop: float
    backward_flop: float
    pixel_bytes: float
    parameters: int


def count_work(model: ModelConfig, batch: int, processes: int) -> Work:
    """The work of tower a's process: half of the net and all of fc8, or both towers where it holds both.

    The backward of a layer takes two products where the forward takes one, but conv1 needs no gradient of the image.
    """
    rows = count_layers(model)
    alone = processes == 1 or model.towers == 1
    mine = {row.layer: row.multiply_accumulates * (1.0 if alone or row.layer == "fc8" else 0.5) for row in rows}
    forward = 2.0 * sum(mine.values()) * batch
    return Work(
        forward_flop=forward,
        backward_flop=2 * forward - 2.0 * mine["conv1"] * batch,
        pixel_bytes=float(FLOAT_BYTES * model.channels * model.image_px**2 * batch),
        parameters=sum(row.parameters_a + (row.parameters_b if processes == 1 else 0) for row in rows),
    )


def merge(
    parts: list["Part"],
    setting: Setting,
    model: ModelConfig,
    environment: dict[str, Any],
    *,
    scaling: tuple[Point, ...] = (),
) -> BenchRecord:
    """One record out of the parts of all processes, tower a's (or the only one's) first."""
    first = parts[0]
    wholes = {name: _whole(parts, name, setting.batch_size) for name in ("loader", "synthetic", "end to end")}
    synthetic = wholes["synthetic"]
    assert synthetic is not None
    ceilings = {ceiling.name: ceiling for ceiling in first.ceilings}
    stages = _loader_stages(parts, setting, ceilings, count_work(model, setting.batch_size, setting.processes))
    stages += _net_stages(parts, setting, ceilings, count_work(model, setting.batch_size, setting.processes))
    stages += _checkpoint(first, setting, ceilings)
    begin = min((span.begin_ms for span in first.timeline), default=0.0)
    timeline = tuple(
        dataclasses.replace(span, begin_ms=span.begin_ms - begin, end_ms=span.end_ms - begin)
        for part in parts
        for span in part.timeline
    )
    return BenchRecord(
        environment=environment,
        setting=setting,
        ceilings=tuple(first.ceilings),
        stages=tuple(stages),
        loader=wholes["loader"],
        synthetic=synthetic,
        whole=wholes["end to end"],
        fewer={
            int(name.removeprefix(FEWER)): whole
            for name in first.slots
            if name.startswith(FEWER) and (whole := _whole(parts, name, setting.batch_size))
        },
        timeline=timeline,
        sweep=tuple(_point(size, times, size) for size, times in first.sweep.items()),
        scaling=scaling,
    )


def _point(x: int, times: list[float], batch: int) -> Point:
    """A rate out of seconds a step."""
    rates = Figure.of([batch / value for value in times])
    return Point(x, rates.median, rates.low, rates.high)


def _whole(parts: list["Part"], name: str, batch: int) -> Whole | None:
    """The slower tower's wall time, all towers' processor time."""
    if name not in parts[0].slots:
        return None
    walls = [max(row[1] / row[0] for row in rows) for rows in zip(*(part.slots[name] for part in parts), strict=True)]
    ms = Figure.of([1e3 * wall for wall in walls])
    own_ms = max(1e3 * sum(r[3] for r in p.slots[name]) / sum(r[0] for r in p.slots[name]) for p in parts)
    return Whole(ms, sum(_cpu_ms(part, name) for part in parts), 1e3 * batch / ms.median, own_ms)


def _cpu_ms(part: "Part", name: str) -> float:
    """Processor milliseconds a batch, over all slots."""
    rows = part.slots[name]
    return 1e3 * sum(row[2] for row in rows) / sum(row[0] for row in rows)


def _loader_stages(parts: list["Part"], setting: Setting, ceilings: dict[str, Ceiling], work: Work) -> list[Stage]:
    """Read, decode, augment: each less what comes before it, round by round."""
    first = parts[0]
    if "loader" not in first.slots:
        return []
    walls = {name: [1e3 * row[1] / row[0] for row in first.slots[name]] for name in ("read", "decode", "loader")}
    cpus = {name: _cpu_ms(first, name) for name in ("read", "decode", "loader")}
    disk = "cached read" if (setting.cached or 0) > 0.9 else "disk read"
    read_ms = setting.batch_size * setting.read_bytes / 1e3 / ceilings[disk].figure.median if disk in ceilings else None
    stages = [_stage("read", "loader", walls["read"], setting.batch_size, cpu_ms=cpus["read"])]
    stages[0] = dataclasses.replace(stages[0], ceiling=disk if read_ms else "", ceiling_ms=read_ms)
    for name, before, after in (("decode", "read", "decode"), ("augment", "decode", "loader")):
        less = [max(0.0, b - a) for a, b in zip(walls[before], walls[after], strict=True)]
        cpu = max(0.0, cpus[after] - cpus[before])
        stages.append(_stage(name, "loader", less, setting.batch_size, cpu_ms=cpu))
    single = first.slots.get("decode, 1 thread")
    if single:
        threads = min(setting.threads, setting.cores)
        alone = Figure.of([1e3 * row[1] / row[0] for row in single])
        perfect = alone.median / threads - stages[0].ms.median
        note = f"1 thread: {alone.median:.3g} ms with reading; ceiling: {threads} times its rate"
        if perfect > alone.noise / threads + stages[0].ms.noise:  # else it drowns in what reading takes
            stages[1] = dataclasses.replace(stages[1], ceiling="decoding thread", ceiling_ms=perfect, note=note)
    if setting.device == "cpu" and "memory copy" in ceilings:  # uint8 pixels in, float32 out, once
        least = 1.25 * work.pixel_bytes / ceilings["memory copy"].figure.median / 1e6
        stages[2] = dataclasses.replace(stages[2], ceiling="memory copy", ceiling_ms=least)
    return stages


def _stage(name: str, group: str, ms: list[float], batch: int, *, cpu_ms: float | None = None) -> Stage:
    figure = Figure.of(ms)
    return Stage(name, group, figure, 1e3 * batch / figure.median if figure.median > 0 else float("inf"), cpu_ms)


def _net_stages(parts: list["Part"], setting: Setting, ceilings: dict[str, Ceiling], work: Work) -> list[Stage]:
    """Transfer, forward, crossings, backward, check, optimizer and the rest, of synthetic training on tower a.

    A crossing takes as long as it takes the tower that came later; what the other spends on it besides is waiting.
    """
    mine = parts[0].steps["synthetic"]
    others = [part.steps["synthetic"] for part in parts[1:]]
    crossings = [name for name in mine[0] if " " in name]
    true: dict[str, list[float]] = {
        name: [min([row[name], *(other[i][name] for other in others)]) for i, row in enumerate(mine)]
        for name in crossings
    }
    columns = {name: [row.get(name, 0.0) for row in mine] for name in ("transfer", "forward", "backward", "check")}
    columns["exchange"] = [sum(values) for values in zip(*true.values(), strict=True)] if true else [0.0] * len(mine)
    columns["waiting"] = [row["exchange"] - moved for row, moved in zip(mine, columns["exchange"], strict=True)]
    columns["optimizer"] = [row["optimizer"] for row in mine]
    columns["rest"] = [row["rest"] + row.get("wait", 0.0) for row in mine]
    order = ("transfer", "forward", "exchange", "waiting", "backward", "check", "optimizer", "rest")
    shown = [name for name in order if true or name not in ("exchange", "waiting")]
    stages = [_stage(name, "net", [1e3 * value for value in columns[name]], setting.batch_size) for name in shown]
    stages += [
        _stage(name, "crossing", [1e3 * value for value in true[name]], setting.batch_size) for name in crossings
    ]
    return [_bounded(stage, setting, ceilings, work, len(crossings)) for stage in stages]


def _bounded(stage: Stage, setting: Setting, ceilings: dict[str, Ceiling], work: Work, crossings: int) -> Stage:
    """The stage with its ceiling, if it has one."""
    copied = {"transfer": 2 * work.pixel_bytes, "optimizer": float(OPTIMIZER_PASSES * FLOAT_BYTES * work.parameters)}
    products = {"forward": work.forward_flop, "backward": work.backward_flop}
    if stage.name in copied and "memory copy" in ceilings:
        least = copied[stage.name] / ceilings["memory copy"].figure.median / 1e6
        if stage.name == "transfer" and stage.ms.median < least / 2:
            return dataclasses.replace(stage, note="nothing to copy: the layout was right")
        return dataclasses.replace(stage, ceiling="memory copy", ceiling_ms=least)
    kind = f"matrix {setting.precision}"
    if setting.precision == "fp32" and "matrix tf32" in ceilings:
        kind = "matrix tf32"  # what cuDNN's convolutions use for fp32
    if stage.name in products and kind in ceilings:
        least = products[stage.name] / ceilings[kind].figure.median / 1e6
        return dataclasses.replace(stage, ceiling=kind, ceiling_ms=least)
    if stage.name == "exchange" and "exchange bandwidth" in ceilings:
        moved_ms = setting.crossing_bytes / 2 / ceilings["exchange bandwidth"].figure.median / 1e6
        least = moved_ms + crossings * ceilings["exchange latency"].figure.median / 1e3
        return dataclasses.replace(stage, ceiling="exchange bandwidth", ceiling_ms=least)
    return stage


def _checkpoint(part: "Part", setting: Setting, ceilings: dict[str, Ceiling]) -> list[Stage]:
    if not part.checkpoints:
        return []
    stage = _stage("checkpoint", "run", [1e3 * value for value in part.checkpoints], setting.batch_size)
    whose = "both towers" if part.tower == "both" else f"tower {part.tower}"
    note = f"{part.checkpoint_bytes / 1e6:.3g} MB of {whose}; not in every step"
    disk = ceilings.get("disk write")
    least = part.checkpoint_bytes / disk.figure.median / 1e3 if disk else None
    return [dataclasses.replace(stage, ceiling="disk write" if disk else "", ceiling_ms=least, note=note)]
