"""Arithmetic about a result: the end-to-end rate that its stages predict, what a change would bring, more GPUs.

Pure functions; every formula stands in ``docs/bench.md``.
"""

import dataclasses
from collections.abc import Sequence

from trainer.bench.record import BenchRecord

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a step costs, by what it takes up.

    Attributes:
        loader_ms: wall time of a batch of the loader alone.
        net_ms: wall time of a step of synthetic training alone.
        loader_cpu_ms, net_cpu_ms: processor time of each, all processes.
        cores: processor cores that they share.
        own_ms: the loader's work in the training thread, which the net waits for.
        stall_share: milliseconds that the net stands still for a millisecond of the loader's processor time, see
            :func:`stall_share`.
    """

    loader_ms: float
    net_ms: float
    loader_cpu_ms: float
    net_cpu_ms: float
    cores: int
    own_ms: float = 0.0
    stall_share: float = 0.0

    @property
    def processor_ms(self) -> float:
        """The step if every core did nothing but useful work."""
        return (self.loader_cpu_ms + self.net_cpu_ms) / self.cores

    @property
    def stall_ms(self) -> float:
        """How long the net stands still because the loader has a core that one of its threads needs."""
        return self.stall_share * self.loader_cpu_ms

    @property
    def step_ms(self) -> float:
        """Predicted wall time: loading and training overlap, but cores cannot be in two places."""
        return max(self.loader_ms, self.net_ms + self.own_ms + self.stall_ms, self.processor_ms)

    @property
    def limit(self) -> str:
        """Which it is: ``data``, ``net``, or ``processor`` where both together want more than the cores have."""
        terms = {"data": self.loader_ms, "net": self.net_ms + self.own_ms, "processor": self.processor_ms}
        return max(terms, key=lambda name: terms[name])


def stall_share(net_threads: int, loader_threads: int, cores: int) -> float:
    """How long a net of several threads stands still for the loader, of the loader's processor time.

    The net's threads work in step, and each waits (actively) for all: it goes on only while it has all its cores.
    Loader threads that find no other core take one of the net's. If k of them work at once, they stop the net for 1/k
    of their processor time; every k from 1 to all is taken as equally likely.

    Args:
        net_threads, loader_threads: of all processes on this machine.
        cores: of this machine.
    """
    crowded = min(loader_threads - max(0, cores - net_threads), net_threads)
    if net_threads < 2 or crowded <= 0:
        return 0.0
    return crowded / loader_threads * sum(1 / k for k in range(1, crowded + 1)) / crowded


def costs_of(record: BenchRecord) -> Costs:
    """The costs that a result measured; without data, the net's alone."""
    loader, setting = record.loader, record.setting
    return Costs(
        loader_ms=loader.ms.median if loader else 0.0,
        net_ms=record.synthetic.ms.median,
        loader_cpu_ms=loader.cpu_ms if loader else 0.0,
        net_cpu_ms=record.synthetic.cpu_ms,
        cores=setting.cores,
        own_ms=loader.own_ms if loader else 0.0,
        stall_share=_stall_share(record, setting.net_threads),
    )


def _stall_share(record: BenchRecord, net_threads: int) -> float:
    """:func:`stall_share` of a result, its net with so many threads a process."""
    setting = record.setting
    if record.loader is None or setting.device != "cpu":
        return 0.0
    return stall_share(net_threads * setting.processes, setting.threads * setting.processes, setting.cores)


def with_threads(record: BenchRecord, net_threads: int) -> Costs:
    """The costs with fewer threads for the net, which :attr:`BenchRecord.fewer` measured."""
    net = record.fewer[net_threads]
    return dataclasses.replace(
        costs_of(record), net_ms=net.ms.median, net_cpu_ms=net.cpu_ms, stall_share=_stall_share(record, net_threads)
    )


def rate(step_ms: float, batch: int) -> float:
    """Images a second."""
    return 1e3 * batch / step_ms if step_ms > 0 else float("inf")


def predict_rate(record: BenchRecord) -> float:
    """End-to-end images a second that the stages predict."""
    return rate(costs_of(record).step_ms, record.setting.batch_size)


def without(record: BenchRecord, stage: str, share: float = 1.0) -> Costs:
    """The costs if a share of a stage took no time: what lifting it could bring at most.

    Args:
        record: a result.
        stage: one of the loader's or the net's.
        share: 1: all of it; 0.5: half.
    """
    costs, found = costs_of(record), record.stage(stage)
    if found is None:
        return costs
    if found.group != "loader":
        return without_part_of_net(record, (stage,), share)
    saved_cpu = share * (found.cpu_ms or 0.0) * record.setting.processes
    return dataclasses.replace(
        costs,
        loader_ms=max(0.0, costs.loader_ms - share * found.ms.median),
        loader_cpu_ms=max(0.0, costs.loader_cpu_ms - saved_cpu),
    )


def without_part_of_net(record: BenchRecord, stages: Sequence[str], share: float = 1.0) -> Costs:
    """The costs if a share of some of the net's stages took no time.

    Stages are medians over steps, the net's time is one over slots: what counts is their part of all stages. They take
    the same part of the net's processor time.
    """
    costs = costs_of(record)
    lengths = {stage.name: stage.ms.median for stage in record.stages if stage.group == "net"}
    total = sum(lengths.values())
    kept = 1.0 - share * sum(ms for name, ms in lengths.items() if name in stages) / total if total else 1.0
    return dataclasses.replace(costs, net_ms=kept * costs.net_ms, net_cpu_ms=kept * costs.net_cpu_ms)


@dataclasses.dataclass(frozen=True)
class Links:
    """What a projection assumes about other machines.

    Attributes:
        tower_gb_per_s: between the two towers of a pair, one way, 10**9 bytes/s.
        tower_us: latency of one message between them.
        replica_gb_per_s: between the pairs, one way.
        replica_us: latency of one message there.
        own_devices: every process has a device, and cores for its loader, of its own; False: they share this machine.
        basis: where the figures are from, for people.
    """

    tower_gb_per_s: float
    tower_us: float
    replica_gb_per_s: float
    replica_us: float
    own_devices: bool
    basis: str = ""


@dataclasses.dataclass(frozen=True)
class Projection:
    """A predicted rate, with what it is made of; a model, not a measurement.

    Attributes:
        processes: 1: both towers on one device; 2: a tower each; 2 R: R pairs.
        images_per_s: of all pairs together.
        compute_ms, crossing_ms, reduce_ms, loader_ms: of one step.
        basis: the links that it goes by, in words.
    """

    processes: int
    images_per_s: float
    compute_ms: float
    crossing_ms: float
    reduce_ms: float
    loader_ms: float
    basis: str = ""


MESSAGES = 7  # a step, as tower a waits for them: conv3, fc6, fc7, fc8 forward, then fc7, fc6, conv3 backward


def project(record: BenchRecord, processes: int, links: Links) -> Projection:
    """Predicted training rate of ``processes`` processes, each pair on a batch of the recipe's size.

    One process computes c ms a step without crossings. Two towers on devices of their own take c / 2, and each step
    moves half of the crossing bytes each way: X / (2 B) + 7 latencies. R pairs average their gradients by a ring:
    2 (R - 1) / R * G / B' + 2 (R - 1) latencies, G the bytes of one tower's gradients; not overlapped, so this is the
    slower end. Processes that share one machine share its cores: R pairs take R times the processor time, and the
    loaders of all of them stand in their way as :attr:`Costs.step_ms` says.
    """
    setting, costs = record.setting, costs_of(record)
    pairs = max(1, processes // 2)
    exchanged = sum(stage.ms.median for stage in record.stages if stage.name in ("exchange", "waiting"))
    both_ms = (costs.net_ms - exchanged) * (setting.processes if links.own_devices else 1)  # both towers, one device
    compute = both_ms / min(processes, 2) if links.own_devices else both_ms * pairs
    crossing = reduce = 0.0
    if processes > 1:
        crossing = setting.crossing_bytes / 2 / links.tower_gb_per_s / 1e6 + MESSAGES * links.tower_us / 1e3
    if pairs > 1:
        gradient_bytes = FLOAT_BYTES * setting.parameters / 2
        moved = 2 * (pairs - 1) / pairs * gradient_bytes
        reduce = moved / links.replica_gb_per_s / 1e6 + 2 * (pairs - 1) * links.replica_us / 1e3
    more = 1.0 if links.own_devices else processes / setting.processes
    loader = costs.loader_ms * more
    step = max(compute + crossing + reduce + costs.own_ms, loader)
    if not links.own_devices:
        threads = max(processes, setting.net_threads * setting.processes)
        step = dataclasses.replace(
            costs,
            loader_ms=loader,
            net_ms=compute + crossing + reduce,
            loader_cpu_ms=costs.loader_cpu_ms * more,
            net_cpu_ms=costs.net_cpu_ms * pairs,
            stall_share=stall_share(threads, setting.threads * processes, setting.cores) if costs.stall_share else 0.0,
        ).step_ms
    return Projection(processes, rate(step, pairs * setting.batch_size), compute, crossing, reduce, loader, links.basis)


def links_of(
    record: BenchRecord, *, tower_gb_per_s: float | None = None, replica_gb_per_s: float | None = None
) -> Links:
    """What a projection goes by: the given bandwidths between devices of their own, or those measured on this machine.

    Without any given bandwidth the processes share this machine, and the wire is the measured one (none measured, as
    in a run of one process: 1 GB/s and 100 us, the order of gloo on one machine).
    """
    bandwidth, latency = record.ceiling("exchange bandwidth"), record.ceiling("exchange latency")
    measured = bandwidth.figure.median if bandwidth else 1.0
    latency_us = latency.figure.median if latency else 100.0
    own = tower_gb_per_s is not None or replica_gb_per_s is not None
    tower, replica = tower_gb_per_s or measured, replica_gb_per_s or tower_gb_per_s or measured
    found = "measured" if bandwidth else "assumed"
    said = "given" if tower_gb_per_s else found
    basis = (
        f"towers exchange {tower:.3g} GB/s ({said}), {latency_us:.3g} us a message ({found}); pairs {replica:.3g} GB/s"
        + (" (given)" if replica_gb_per_s else "")
        + ("; a device for each process" if own else "; all processes share this machine")
    )
    return Links(tower, latency_us, replica, latency_us, own, basis)
