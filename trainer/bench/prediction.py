"""The end-to-end rate that the stages predict, the same after a change, and on more GPUs. Pure functions.

Every formula stands in ``docs/bench.md``.
"""

import dataclasses
import math
from collections.abc import Sequence

from trainer.bench.record import BenchRecord, Throughput

FLOAT_BYTES = 4
MESSAGES = 7  # that a tower waits for per step: conv3, fc6, fc7, fc8 forward, then fc7, fc6, conv3 backward


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a step costs, by what it takes up."""

    loader_ms: float  # wall time of a batch of the loader alone
    net_ms: float  # wall time of a step of synthetic training alone
    loader_cpu_ms: float  # processor time of each, all processes
    net_cpu_ms: float
    cores: int  # that they share
    own_ms: float = 0.0  # the loader's work in the training thread, which the net waits for
    stall_share: float = 0.0  # ms that the net stands still for each ms of the loader's processor time

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
        terms = {"data": self.loader_ms, "net": self.net_ms + self.own_ms}
        if self.loader_ms:  # alone, a net on all cores takes their time by definition: which is more is noise
            terms["processor"] = self.processor_ms
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


def costs_of(record: BenchRecord, net: Throughput | None = None, net_threads: int | None = None) -> Costs:
    """The costs that a result measured.

    Args:
        record: the result.
        net: training alone as measured with another setting, instead of :attr:`BenchRecord.synthetic`.
        net_threads: of a process's computation there, where it is another number.
    """
    loader, workload, net = record.loader, record.workload, net or record.synthetic
    count = workload.processes
    stall = 0.0
    if loader and workload.device == "cpu":
        stall = stall_share((net_threads or workload.net_threads) * count, workload.threads * count, workload.cores)
    return Costs(
        loader_ms=loader.ms.median if loader else 0.0,
        net_ms=net.ms.median,
        loader_cpu_ms=loader.cpu_ms if loader else 0.0,
        net_cpu_ms=net.cpu_ms,
        cores=workload.cores,
        own_ms=loader.own_ms if loader else 0.0,
        stall_share=stall,
    )


def rate(step_ms: float, batch: int) -> float:
    """Images per second."""
    return 1e3 * batch / step_ms if step_ms > 0 else float("inf")


def predict_rate(record: BenchRecord) -> float:
    """End-to-end images per second that the stages predict."""
    return rate(costs_of(record).step_ms, record.workload.batch_size)


def without(record: BenchRecord, stages: Sequence[str], share: float = 1.0) -> Costs:
    """The costs if a ``share`` (0..1) of some stages took no time: what lifting them could bring at most.

    The net's stages are medians over steps, its time one over intervals, and the two need not add up on a restless
    machine: what counts is the stages' part of all stages. They take the same part of the net's processor time.
    """
    costs = costs_of(record)
    saved = [stage for name, stage in record.group("loader").items() if name in stages]
    saved_cpu = sum(stage.cpu_ms or 0.0 for stage in saved) * record.workload.processes
    net = {name: stage.ms.median for name, stage in record.group("net").items()}
    total = sum(net.values())
    kept = 1.0 - share * sum(ms for name, ms in net.items() if name in stages) / total if total else 1.0
    return dataclasses.replace(
        costs,
        loader_ms=max(0.0, costs.loader_ms - share * sum(stage.ms.median for stage in saved)),
        loader_cpu_ms=max(0.0, costs.loader_cpu_ms - share * saved_cpu),
        net_ms=kept * costs.net_ms,
        net_cpu_ms=kept * costs.net_cpu_ms,
    )


@dataclasses.dataclass(frozen=True)
class Links:
    """What a projection assumes about the machines."""

    tower_gb_per_s: float  # between the two towers of a pair, one way, 10**9 bytes/s
    replica_gb_per_s: float  # between the pairs, one way
    latency_us: float  # of one message
    own_devices: bool  # every process has a device, and cores for its loader; False: they share this machine
    basis: str = ""  # where the figures are from, for people


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
    basis = (
        f"towers exchange {tower:.3g} GB/s ({'given' if tower_gb_per_s else found}), {latency_us:.3g} us per message "
        f"({found}); pairs {replica:.3g} GB/s{' (given)' if replica_gb_per_s else ''}; "
        + ("a device for each process, which halves the computation" if own else "all processes share this machine")
    )
    return Links(tower, replica, latency_us, own, basis)


@dataclasses.dataclass(frozen=True)
class Projection:
    """A predicted rate, with what one step is made of; a model, not a measurement."""

    processes: int  # 1: both towers on one device; 2: a tower each; 2 R: R pairs
    images_per_s: float  # of all pairs together
    compute_ms: float
    crossing_ms: float
    sum_ms: float
    control_ms: float
    loader_ms: float
    basis: str  # the links that it goes by, in words


def project(record: BenchRecord, processes: int, links: Links) -> Projection:
    """Predicted training rate of ``processes`` processes, each pair on a batch of the recipe's size.

    The model is :func:`trainer.planning.scale.predict_step`, with the measured computation: c ms of one process
    without crossings, c / 2 on each of two devices. Processes that share one machine share its cores: R pairs take R
    times the processor time, and the loaders of all of them stand in their way as :attr:`Costs.step_ms` says.
    """
    from trainer.parallel.data_parallel import BUCKET_BYTES  # both import torch, which all else here does without
    from trainer.planning.scale import Traffic, Wires, predict_step

    workload, costs, pairs = record.workload, costs_of(record), max(1, processes // 2)
    alone_ms = costs.net_ms - sum(stage.ms.median for stage in record.stages if stage.name in ("exchange", "waiting"))
    compute_ms = alone_ms * (workload.processes / min(processes, 2) if links.own_devices else pairs)
    crosses, sums = processes > 1, pairs > 1
    gradient_bytes = FLOAT_BYTES * workload.parameters // 2
    traffic = Traffic(
        tower="a",
        crossing_calls=MESSAGES * crosses,
        crossing_bytes=workload.crossing_bytes // 2 * crosses,
        sum_calls=math.ceil(gradient_bytes / BUCKET_BYTES) * sums,
        sum_bytes=gradient_bytes * sums,
        control_bytes=0,
    )
    wires = Wires(links.replica_gb_per_s, links.latency_us * crosses, math.nan, links.tower_gb_per_s)
    step = predict_step(compute_ms / 1e3, traffic, wires, replicas=pairs)
    more = 1.0 if links.own_devices else processes / workload.processes
    threads = max(processes, workload.net_threads * workload.processes)
    stalls = costs.stall_share and stall_share(threads, workload.threads * processes, workload.cores)
    grown = dataclasses.replace(
        costs,
        loader_ms=costs.loader_ms * more,
        net_ms=1e3 * step.step_s,
        loader_cpu_ms=0.0 if links.own_devices else costs.loader_cpu_ms * more,
        net_cpu_ms=0.0 if links.own_devices else costs.net_cpu_ms * pairs,
        stall_share=stalls,
    )
    return Projection(
        processes=processes,
        images_per_s=rate(grown.step_ms, pairs * workload.batch_size),
        compute_ms=compute_ms,
        crossing_ms=1e3 * step.crossing_s,
        sum_ms=1e3 * step.sum_s,
        control_ms=1e3 * step.control_s,
        loader_ms=grown.loader_ms,
        basis=links.basis,
    )
