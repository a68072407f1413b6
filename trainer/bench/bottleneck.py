"""Which stage is the limit, by how much, and what would lift it: in words, each with a figure. Pure functions."""

import dataclasses
from collections.abc import Iterator

from trainer.bench.prediction import Costs, Links, costs_of, project, rate, with_threads, without, without_part_of_net
from trainer.bench.record import BenchRecord, Stage

WORTH = 1.03  # a suggestion must promise at least this factor
MOST = 4  # suggestions
COMPUTATION = ("forward", "backward")
WORDS = {
    "read": "reading the shards",
    "decode": "decoding",
    "augment": "augmentation (crop, mirror, mean, colour)",
    "transfer": "bringing the batch into the net's layout",
    "computation": "computation (forward and backward)",
    "exchange": "the exchange between the towers",
    "waiting": "waiting for the other tower",
    "handover": "the loader's work in the training thread (draws, mean image, keys)",
    "check": "the check before the update (gradient norms, control message)",
    "optimizer": "the optimizer",
    "rest": "what surrounds the step (metrics, Python)",
}


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A change that would help.

    Attributes:
        change: what to do.
        images_per_s: end to end after it.
        factor: over now.
        basis: ``measured`` or ``computed``, and from what.
    """

    change: str
    images_per_s: float
    factor: float
    basis: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What limits.

    Attributes:
        limit: a stage of the loader, or ``computation``, ``exchange``, ``optimizer``...
        side: ``data``, ``net``, or ``processor`` where both together fill the cores.
        sentence: for people.
        suggestions: the best first.
    """

    limit: str
    side: str
    sentence: str
    suggestions: tuple[Suggestion, ...]


def judge(record: BenchRecord) -> Verdict:
    """Names the limit of a result and what would lift it."""
    costs = costs_of(record)
    side, limit, share = _limit(record, costs)
    batch = record.setting.batch_size
    now = rate(costs.step_ms, batch)
    lifted = _lifted(record, limit)
    free = rate(lifted.step_ms, batch) / now
    whose = {"data": "the loader's time", "net": "the step", "processor": "the processor time of a step"}[side]
    gain = (
        f"If it cost nothing, training would be {free:.2f} times as fast"
        if lifted.step_ms > 0
        else "Nothing else is left"
    )
    sentence = f"The limit is {WORDS[limit]}: {share:.0%} of {whose}. {gain}. {_sides(record, costs)}"
    found = sorted(_suggest(record, costs, limit), key=lambda suggestion: -suggestion.factor)
    kept = tuple(suggestion for suggestion in found if suggestion.factor >= WORTH)[:MOST]
    return Verdict(limit, side, sentence.strip(), kept)


def _sides(record: BenchRecord, costs: Costs) -> str:
    """How the loader and the net compare."""
    if record.loader is None:
        return "The pictures were synthetic, so nothing was read or decoded."
    loader, net = record.loader.images_per_s, record.synthetic.images_per_s
    text = f"Alone, the loader gives {loader:,.0f} images/s and the net takes {net:,.0f}"
    if costs.limit == "processor":
        return f"{text}; together they need more processor time than {record.setting.cores} cores have."
    if net > loader:
        return f"{text}: the net could take {net / loader:.2f} times what the loader gives."
    return f"{text}: the loader could give {loader / net:.2f} times what the net takes."


def _limit(record: BenchRecord, costs: Costs) -> tuple[str, str, float]:
    """Side, stage, and the stage's share of that side's time."""
    loader = {stage.name: stage for stage in record.stages if stage.group == "loader"}
    net = _net_ms(record)
    if costs.limit == "data":
        name = max(loader, key=lambda key: loader[key].ms.median)
        return "data", name, loader[name].ms.median / sum(stage.ms.median for stage in loader.values())
    if costs.limit == "net":
        name = max(net, key=lambda key: net[key])
        return "net", name, net[name] / sum(net.values())
    spent = {name: (stage.cpu_ms or 0.0) * record.setting.processes for name, stage in loader.items()}
    net.pop("handover", None)  # is part of the loader's processor time already
    spent |= {name: ms * costs.net_cpu_ms / costs.net_ms for name, ms in net.items()}
    name = max(spent, key=lambda key: spent[key])
    return "processor", name, spent[name] / sum(spent.values())


def _net_ms(record: BenchRecord) -> dict[str, float]:
    """Milliseconds of a step by cause; forward and backward are one."""
    found: dict[str, float] = {}
    for stage in record.stages:
        if stage.group == "net":
            name = "computation" if stage.name in COMPUTATION else stage.name
            found[name] = found.get(name, 0.0) + stage.ms.median
    if record.loader and record.loader.own_ms:
        found["handover"] = record.loader.own_ms
    return found


def _lifted(record: BenchRecord, limit: str) -> Costs:
    """The costs without a limit."""
    if limit == "handover":
        return dataclasses.replace(costs_of(record), own_ms=0.0)
    return without_part_of_net(record, COMPUTATION) if limit == "computation" else without(record, limit)


def _suggest(record: BenchRecord, costs: Costs, limit: str) -> Iterator[Suggestion]:
    """Every change that could help, with what it would bring."""
    now, batch = rate(costs.step_ms, record.setting.batch_size), record.setting.batch_size

    def promise(change: str, changed: Costs, basis: str) -> Suggestion:
        after = rate(changed.step_ms, batch)
        return Suggestion(change, after, after / now, basis)

    loader = {stage.name: stage for stage in record.stages if stage.group == "loader"}
    if loader:
        yield from _suggest_loader(record, loader, promise)
    for threads in record.fewer:
        yield promise(
            f"train.threads = {threads}",
            with_threads(record, threads),
            f"training alone measured with {threads}; the loader then takes fewer cores from under it",
        )
    yield from _suggest_net(record, limit, promise)
    best = max(record.sweep, key=lambda point: point.images_per_s, default=None)
    measured = record.whole or record.synthetic
    if best and best.x != batch:
        yield Suggestion(
            f"train.batch_size = {best.x}", best.images_per_s, best.images_per_s / measured.images_per_s, "measured"
        )


def _suggest_loader(record: BenchRecord, loader: dict[str, Stage], promise) -> Iterator[Suggestion]:  # type: ignore[no-untyped-def]
    """Threads, raw shards, split feeding, a faster disk."""
    setting = record.setting
    if setting.threads < setting.cores and setting.encoding != "raw":
        share = 1 - setting.threads / setting.cores
        changed = dataclasses.replace(without(record, "decode", share), loader_cpu_ms=costs_of(record).loader_cpu_ms)
        yield promise(
            f"data.threads = {setting.cores} instead of {setting.threads}",
            changed,
            "computed: the decoding's wall time divided among all cores",
        )
    if setting.encoding != "raw":
        yield promise(*_raw(record, loader))
    wire = record.ceiling("exchange bandwidth")
    if setting.processes == 2 and setting.feed == "each" and wire:
        moved_ms = setting.batch_size / 2 * setting.raw_bytes / wire.figure.median / 1e6
        halved = without(record, "decode", 0.5)
        changed = dataclasses.replace(halved, loader_ms=halved.loader_ms + moved_ms)
        yield promise(
            "data.feed = 'split'", changed, f"computed: half the decoding, {moved_ms:.2g} ms of pixels exchanged"
        )
    disk, cached = record.ceiling("disk read"), record.ceiling("cached read")
    if disk and cached and loader["read"].ceiling == "disk read":
        share = 1 - disk.figure.median / max(cached.figure.median, disk.figure.median)
        yield promise(
            "a data set that stays in memory, or a faster disk",
            without(record, "read", share),
            f"computed: reading at {cached.figure.median:,.0f} MB/s as from memory, not {disk.figure.median:,.0f}",
        )


def _raw(record: BenchRecord, loader: dict[str, Stage]) -> tuple[str, Costs, str]:
    """Raw shards: decoding left out, reading longer by the size of the pictures."""
    setting, costs = record.setting, costs_of(record)
    longer = setting.raw_bytes / setting.sample_bytes
    read, decode = loader["read"], loader["decode"]
    saved_ms = decode.ms.median - (longer - 1) * read.ms.median
    saved_cpu = ((decode.cpu_ms or 0.0) - (longer - 1) * (read.cpu_ms or 0.0)) * setting.processes
    changed = dataclasses.replace(
        costs,
        loader_ms=max(costs.loader_ms - saved_ms, 0.0),
        loader_cpu_ms=max(costs.loader_cpu_ms - saved_cpu, 0.0),
    )
    needed = rate(changed.step_ms, setting.batch_size) * setting.raw_bytes / 1e6
    return (
        "raw shards (pipeline prepare --encoding raw)",
        changed,
        f"computed: no decoding, {longer:.1f} times the bytes to read, which then is {needed:,.0f} MB/s",
    )


def _suggest_net(record: BenchRecord, limit: str, promise) -> Iterator[Suggestion]:  # type: ignore[no-untyped-def]
    """bf16, larger batch, a device a tower."""
    setting = record.setting
    wide, narrow = record.ceiling("matrix tf32") or record.ceiling("matrix fp32"), record.ceiling("matrix bf16")
    if setting.precision == "fp32" and wide and narrow and narrow.figure.median > wide.figure.median:
        factor = narrow.figure.median / wide.figure.median
        changed = without_part_of_net(record, COMPUTATION, 1 - 1 / factor)
        basis = f"computed, at most: matrices are {factor:.2f} times as fast in bf16 here"
        yield promise("train.precision = 'bf16'", changed, basis)
    for name in ("optimizer", "exchange"):
        stage = record.stage(name)
        if stage is None or (name == "exchange" and limit != "exchange"):
            continue
        share = 0.5 if name == "optimizer" else _latency_share(record, stage) / 2
        changed = without(record, name, share)
        basis = (
            "computed: its cost a step does not grow with the batch"
            if name == "optimizer"
            else "computed: latency a step halves an image"
        )
        yield promise(f"twice the batch size, for {WORDS[name]}", changed, basis)
    if setting.processes == 1 and setting.device.startswith("cuda"):
        links = Links(tower_gb_per_s=50.0, tower_us=10.0, replica_gb_per_s=50.0, replica_us=10.0, own_devices=True)
        found = project(record, 2, links)
        costs = dataclasses.replace(costs_of(record), net_ms=found.compute_ms + found.crossing_ms)
        yield promise(
            "--processes 2, a GPU a tower", costs, "computed: half the computation each, crossings at 50 GB/s"
        )
    if setting.processes == 2 and limit in ("exchange", "waiting"):
        yield promise(
            "--processes 1: both towers in one process",
            without_part_of_net(record, ("exchange", "waiting")),
            "computed: no exchange, no waiting, the same computation on the same cores",
        )


def _latency_share(record: BenchRecord, exchange: Stage) -> float:
    """The part of the exchange that does not grow with the batch."""
    latency = record.ceiling("exchange latency")
    messages = sum(stage.group == "crossing" for stage in record.stages)
    return (
        min(1.0, messages * latency.figure.median / 1e3 / exchange.ms.median) if latency and exchange.ms.median else 0.0
    )
