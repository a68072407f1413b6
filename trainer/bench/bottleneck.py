"""Which stage is the limit, by how much, and what would lift it: in words, each with a figure. Pure functions.

A suggestion never contradicts what the same result measured: where a change was measured, that figure counts, and a
result that contradicts itself gives no advice at all.
"""

import dataclasses
from collections.abc import Iterator

from trainer.bench.prediction import Costs, Links, costs_of, project, rate, without
from trainer.bench.record import BenchRecord, Figure, Stage, Throughput, coherent, differ
from twotower.words import pluralize

WORTH = 1.03  # a suggestion must promise at least this factor
MOST = 4  # suggestions
IMPOSSIBLE = 1.1  # times the slower of loader and training alone: noise explains no more
RESTLESS = 1.5  # upper quartile over lower
COMPUTATION = ("forward", "backward")
PROCESSES = {1: "--processes 1: both towers in one process", 2: "--processes 2: one process per tower"}
WORDS = {
    "read": "reading the shards",
    "decode": "decoding",
    "augment": "augmentation (crop, mirror, mean, color)",
    "transfer": "bringing the batch into the net's layout",
    "computation": "computation (forward and backward)",
    "exchange": "the exchange between the towers",
    "waiting": "waiting for the other tower",
    "handover": "the loader's work in the training thread (draws, mean image, keys)",
    "check": "the check before the update (gradient norms, control message)",
    "optimizer": "the optimizer",
    "rest": "what surrounds the step (metrics, Python)",
}
Change = tuple[str, Costs, str]  # what to do, the costs after it, where that figure is from


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A change that would help."""

    change: str  # what to do
    images_per_s: float  # end to end after it
    factor: float  # over now
    basis: str  # measured or computed, and from what


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What limits."""

    limit: str  # a stage of the loader, or computation, exchange, optimizer...
    side: str  # data, net, or processor where both together fill the cores
    sentence: str  # for people
    suggestions: tuple[Suggestion, ...]  # the best first
    doubt: str = ""  # what makes the result doubtful; then there are no suggestions
    otherwise: str = ""  # where there are no suggestions: why, and what would help

    def is_at(self, stage: str) -> bool:
        """Whether a stage is the limit, or part of it."""
        return stage in (COMPUTATION if self.limit == "computation" else (self.limit,))


@coherent()
def judge(record: BenchRecord) -> Bottleneck:
    """Names the limit of a result and what would lift it."""
    costs, batch = costs_of(record), record.workload.batch_size
    side, limit, share = _limit(record, costs)
    lifted = dataclasses.replace(costs, own_ms=0.0) if limit == "handover" else without(record, _stages_of(limit))
    gain = "Nothing else is left"
    if lifted.step_ms > 0:
        gain = f"If it cost nothing, training would be {costs.step_ms / lifted.step_ms:.2f} times as fast"
    whose = {"data": "the loader's time", "net": "the step", "processor": "the processor time of a step"}[side]
    sentence = f"The limit is {WORDS[limit]}: {share:.0%} of {whose}. {gain}. {_compare_sides(record, costs)}"
    if doubt := find_doubt(record):
        return Bottleneck(limit, side, sentence, (), doubt, "No advice is drawn from figures that do not hold.")
    found = [
        Suggestion(change, rate(after.step_ms, batch), costs.step_ms / after.step_ms if after.step_ms else 1.0, basis)
        for change, after, basis in (*_change_loader(record, costs), *_change_net(record, costs, limit))
    ]
    best = max(record.sweep, key=lambda size: record.sweep[size].median, default=batch)
    if best != batch and differ(record.sweep[best], _rates(record.training, batch)):
        images_per_s = record.sweep[best].median
        factor = images_per_s / record.training.images_per_s
        found.append(Suggestion(f"train.batch_size = {best}", images_per_s, factor, "measured"))
    found.sort(key=lambda suggestion: -suggestion.factor)
    worth = tuple(row for row in found if row.factor >= WORTH)[:MOST]
    return Bottleneck(limit, side, sentence, worth, otherwise="" if worth else _what_else(record, side))


def find_doubt(record: BenchRecord) -> str:
    """What makes a result doubtful: a rate that cannot be, or rounds that differ by much; empty where nothing does."""
    again = "Something else probably used this machine: measure again when it is idle, or with a larger --seconds"
    if record.end_to_end and record.loader and (ratio := share_of_slower(record)) > IMPOSSIBLE:
        return (
            "These figures contradict each other: end to end cannot be faster than the loader alone or training "
            f"alone, and was {ratio:.2f} times as fast as the slower of them. {again}."
        )
    for name, throughput in record.throughputs().items():
        low, high = throughput.ms.low, throughput.ms.high
        if high > RESTLESS * low:
            return f"The rounds differ by much: {name} took {low:.3g}–{high:.3g} ms per batch. {again}."
    return ""


def share_of_slower(record: BenchRecord) -> float:
    """End to end as a share of the slower of the loader alone and training alone."""
    assert record.end_to_end is not None and record.loader is not None
    return record.end_to_end.images_per_s / min(record.loader.images_per_s, record.synthetic.images_per_s)


def _rates(throughput: Throughput, batch: int) -> Figure:
    """A throughput's times as images/s."""
    ms = throughput.ms
    return Figure(rate(ms.median, batch), rate(ms.high, batch), rate(ms.low, batch), ms.n)


def _what_else(record: BenchRecord, side: str) -> str:
    """What would help where no change that can be computed does."""
    on_gpu = record.workload.device.startswith("cuda")
    if side == "data":
        what = "more processor cores for the loader, or smaller stored images (prepare --resize)"
    elif on_gpu:
        what = "more GPUs (--replicas), or a smaller net (fewer channels, model.image_px)"
    else:
        what = "a GPU, more cores, or a smaller net (fewer channels, model.image_px)"
    return f"No change that this benchmark can compute or has measured promises 3 % or more. What would: {what}."


def _stages_of(limit: str) -> tuple[str, ...]:
    return COMPUTATION if limit == "computation" else (limit,)


def _compare_sides(record: BenchRecord, costs: Costs) -> str:
    """How the loader and the net compare."""
    if record.loader is None:
        return "The images were synthetic, so nothing was read or decoded."
    loader, net = record.loader.images_per_s, record.synthetic.images_per_s
    text = f"Alone, the loader gives {loader:,.0f} images/s and the net takes {net:,.0f}"
    if costs.limit == "processor":
        return (
            f"{text}; together they need more processor time than {pluralize(record.workload.cores, 'core')} can give."
        )
    if net > loader:
        return f"{text}: the net could take {net / loader:.2f} times what the loader gives."
    return f"{text}: the loader could give {loader / net:.2f} times what the net takes."


def _limit(record: BenchRecord, costs: Costs) -> tuple[str, str, float]:
    """Side, stage, and the stage's share of that side's time."""
    loader, net = record.group("loader"), record.group("net")
    spent = {name: stage.ms.median for name, stage in net.items() if name not in COMPUTATION}
    spent["computation"] = sum(net[name].ms.median for name in COMPUTATION if name in net)
    if costs.limit == "data":
        spent = {name: stage.ms.median for name, stage in loader.items()}
    elif costs.limit == "net":
        spent["handover"] = costs.own_ms
    else:  # the handover is part of the loader's processor time already
        spent = {name: ms * costs.net_cpu_ms / costs.net_ms for name, ms in spent.items()}
        spent |= {name: (stage.cpu_ms or 0.0) * record.workload.processes for name, stage in loader.items()}
    name = max(spent, key=lambda key: spent[key])
    return costs.limit, name, spent[name] / sum(spent.values())


def _change_loader(record: BenchRecord, costs: Costs) -> Iterator[Change]:
    """Threads, raw shards, split feeding, a faster disk."""
    loader, workload = record.group("loader"), record.workload
    if not loader:
        return
    if workload.encoding != "raw":
        if workload.threads < workload.cores:
            changed = without(record, ("decode",), 1 - workload.threads / workload.cores)
            changed = dataclasses.replace(changed, loader_cpu_ms=costs.loader_cpu_ms)
            change = f"data.threads = {workload.cores} instead of {workload.threads}"
            yield change, changed, "computed: the decoding's wall time divided among all cores"
        yield _store_raw(record, loader, costs)
    wire = record.ceiling("exchange bandwidth")
    if workload.processes == 2 and workload.decode == "replicated" and wire:
        moved_ms = workload.batch_size / 2 * workload.raw_bytes / wire.figure.median / 1e6
        changed = without(record, ("decode",), 0.5)
        changed = dataclasses.replace(changed, loader_ms=changed.loader_ms + moved_ms)
        yield "data.decode = 'sharded'", changed, f"computed: half the decoding, {moved_ms:.2g} ms of pixels exchanged"
    disk, cached = record.ceiling("disk read"), record.ceiling("cached read")
    if disk and cached and loader["read"].ceiling == "disk read":
        now, then = disk.figure.median, cached.figure.median
        changed = without(record, ("read",), 1 - now / max(then, now))
        basis = f"computed: reading at {then:,.0f} MB/s as from memory, not {now:,.0f}"
        yield "a data set that stays in memory, or a faster disk", changed, basis


def _store_raw(record: BenchRecord, loader: dict[str, Stage], costs: Costs) -> Change:
    """Raw shards: decoding left out, reading longer by the size of the images."""
    workload, read, decode = record.workload, loader["read"], loader["decode"]
    longer = workload.raw_bytes / workload.sample_bytes
    saved_ms = decode.ms.median - (longer - 1) * read.ms.median
    saved_cpu = ((decode.cpu_ms or 0.0) - (longer - 1) * (read.cpu_ms or 0.0)) * workload.processes
    changed = dataclasses.replace(
        costs,
        loader_ms=max(costs.loader_ms - saved_ms, 0.0),
        loader_cpu_ms=max(costs.loader_cpu_ms - saved_cpu, 0.0),
    )
    needed = rate(changed.step_ms, workload.batch_size) * workload.raw_bytes / 1e6
    basis = f"computed: no decoding, {longer:.1f} times the bytes to read, which then is {needed:,.0f} MB/s"
    return "raw shards (pipeline prepare --encoding raw)", changed, basis


def _change_net(record: BenchRecord, costs: Costs, limit: str) -> Iterator[Change]:
    """Fewer threads, bf16, larger batch, a device for each tower."""
    workload = record.workload
    for threads in record.by_threads:
        basis = f"training alone measured with {threads}; the loader then takes fewer cores from under it"
        yield f"train.threads = {threads}", costs_of(record, record.by_threads[threads], threads), basis
    for precision, measured in record.by_precision.items():
        if not differ(measured.ms, record.synthetic.ms):
            continue
        basis = f"training alone measured with it: {measured.images_per_s:,.0f} images/s"
        yield f"train.precision = '{precision}'", costs_of(record, measured), basis
    larger = "twice the batch size, for "
    measured_larger = any(size > workload.batch_size for size in record.sweep)  # then that figure counts
    if record.stage("optimizer") and not measured_larger:
        changed = without(record, ("optimizer",), 0.5)
        yield larger + WORDS["optimizer"], changed, "computed: its cost per step does not grow with the batch"
    exchange, latency = record.stage("exchange"), record.ceiling("exchange latency")
    if limit == "exchange" and exchange and latency and not measured_larger:
        fixed_ms = len(record.group("crossing")) * latency.figure.median / 1e3
        changed = without(record, ("exchange",), min(1.0, fixed_ms / exchange.ms.median) / 2)
        yield larger + WORDS["exchange"], changed, "computed: its latency per image halves"
    if workload.processes == 1 and workload.device.startswith("cuda"):
        pair = project(record, 2, Links(50.0, 50.0, 10.0, own_devices=True))
        changed = dataclasses.replace(costs, net_ms=pair.compute_ms + pair.crossing_ms + pair.control_ms)
        basis = "computed: half the computation each, crossings at 50 GB/s"
        yield "--processes 2, a GPU for each tower", changed, basis
    own, other = record.scaling.get(workload.processes), record.scaling.get(3 - workload.processes)
    if own and other:  # measured: both in the same way, one after the other
        if differ(own, other):
            changed = dataclasses.replace(costs, net_ms=costs.net_ms * own.median / other.median)
            basis = f"training alone measured so: {other.median:,.0f} images/s instead of {own.median:,.0f}"
            yield PROCESSES[3 - workload.processes], changed, basis
    elif workload.processes == 2 and limit in ("exchange", "waiting"):
        changed = without(record, ("exchange", "waiting"))
        basis = "computed: no exchange, no waiting, the same computation on the same cores"
        yield PROCESSES[1], changed, basis
