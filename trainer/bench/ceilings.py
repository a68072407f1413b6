"""What this machine can do at most: disk, memory, matrices, wire. Measured in the same run as the stages.

Repeats go on until ``seconds`` have passed, at least :data:`LEAST`; the first is a warm-up. On a GPU the time is
taken by CUDA events around each repeat, and the host waits only after the last.
"""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.bench.record import Ceiling, Figure
from trainer.parallel.link import Link

LEAST, MOST = 5, 200  # repeats
COPY_BYTES = 1 << 27
DISK_BYTES = 1 << 28  # read at most, of a data set
WRITE_BYTES = 1 << 26
PIECE_BYTES = 1 << 22
WIRE_BYTES = 1 << 23
PINGS = 100


def time_repeats(work: Callable[[], object], seconds: float, device: str = "cpu") -> list[float]:
    """Seconds of each repeat of ``work``, the warm-up left out."""
    work()
    if device.startswith("cuda"):
        return _time_on_gpu(work, seconds, device)
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < seconds and len(times) < MOST):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def _time_on_gpu(work: Callable[[], object], seconds: float, device: str) -> list[float]:
    """By CUDA events; how many repeats fit is found before the measurement."""
    torch.cuda.synchronize(device)
    begin_s = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    count = min(MOST, max(LEAST, int(seconds / max(time.perf_counter() - begin_s, 1e-6))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def measure_ceilings(device: str, seconds: float) -> list[Ceiling]:
    """Memory and matrices of a device, and the way to it."""
    found = [copy_ceiling(device, seconds)]
    if device.startswith("cuda"):
        found.append(host_to_device_ceiling(device, seconds))
    return found + matrix_ceilings(device, seconds)


def copy_ceiling(device: str, seconds: float) -> Ceiling:
    """Copying memory that no cache holds; bytes read and bytes written both count."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    times = time_repeats(lambda: target.copy_(source), seconds, device)
    figure = Figure.of([2 * COPY_BYTES / t / 1e9 for t in times])
    return Ceiling("memory copy", figure, "GB/s", f"{COPY_BYTES >> 20} MiB, read and written, {device}")


def host_to_device_ceiling(device: str, seconds: float) -> Ceiling:
    """Copying pinned memory to the GPU."""
    source = torch.ones(COPY_BYTES // 4).pin_memory()
    target = torch.empty(source.shape, device=device)
    times = time_repeats(lambda: target.copy_(source, non_blocking=True), seconds, device)
    figure = Figure.of([COPY_BYTES / t / 1e9 for t in times])
    return Ceiling("host to device", figure, "GB/s", f"{COPY_BYTES >> 20} MiB from pinned memory")


def matrix_ceilings(device: str, seconds: float) -> list[Ceiling]:
    """Square matrix products: fp32 and bf16, and on a GPU tf32, which its convolutions use for fp32."""
    on_gpu = device.startswith("cuda")
    side = 8192 if on_gpu else 1024
    kinds = [("fp32", torch.float32), ("bf16", torch.bfloat16)] + ([("tf32", torch.float32)] if on_gpu else [])
    found = []
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    for name, dtype in kinds:
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = time_repeats(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds, device)  # type: ignore[misc]
        figure = Figure.of([2 * side**3 / t / 1e9 for t in times])
        note = f"{side} x {side}, {threads} thread{'s' if threads > 1 else ''}"
        found.append(Ceiling(f"matrix {name}", figure, "GFLOP/s", note))
    torch.set_float32_matmul_precision(before)
    return found


def wire_ceilings(link: Link, device: str, seconds: float) -> list[Ceiling]:
    """The wire between the towers, below the project's own code: both call this together."""
    on = "cpu" if dist.get_backend(link.group) == "gloo" else device
    times = time_repeats(_swap_of(link, torch.ones(2, device=on)), 0.0, on)
    times += [t for _ in range(PINGS // LEAST) for t in time_repeats(_swap_of(link, torch.ones(2, device=on)), 0.0, on)]
    latency = Ceiling("exchange latency", Figure.of([t * 1e6 for t in times]), "us", "8 bytes, both ways at once")
    times = time_repeats(_swap_of(link, torch.ones(WIRE_BYTES // 4, device=on)), 0.0, on)
    rates = Figure.of([WIRE_BYTES / t / 1e9 for t in times])
    note = f"{WIRE_BYTES >> 20} MiB each way, both ways at once, {dist.get_backend(link.group)}"
    return [latency, Ceiling("exchange bandwidth", rates, "GB/s", note)]


def _swap_of(link: Link, mine: torch.Tensor) -> Callable[[], None]:
    theirs = torch.empty_like(mine)

    def swap() -> None:
        operations = [
            dist.P2POp(dist.isend, mine, link.peer, link.group),
            dist.P2POp(dist.irecv, theirs, link.peer, link.group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return swap


def disk_ceilings(tars: tuple[str, ...], scratch: Path) -> list[Ceiling]:
    """Reading the data set's own files, cold where the system lets go of them, then from memory; and writing."""
    cold, warm, kept = [], [], 0.0
    budget = DISK_BYTES
    for number, tar in enumerate(tars):
        size = Path(tar).stat().st_size
        if number and size > budget:
            break
        budget -= size
        kept += _drop(tar)
        cold.append(_read_rate(tar))
        warm.append(_read_rate(tar))
    share = kept / len(cold)
    state = "cold" if share < 0.05 else f"{share:.0%} of it was still in memory after asking to let go"
    return [
        Ceiling("disk read", Figure.of(cold), "MB/s", f"the data set's tars, {state}"),
        Ceiling("cached read", Figure.of(warm), "MB/s", "the same tars from memory"),
        write_ceiling(scratch),
    ]


def write_ceiling(scratch: Path) -> Ceiling:
    """Writing a file, until it is on the disk."""
    block, path = b"\x5a" * PIECE_BYTES, scratch / "write-test"
    rates = []
    for _ in range(LEAST):
        begin = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(WRITE_BYTES // PIECE_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        rates.append(WRITE_BYTES / (time.perf_counter() - begin) / 1e6)
        path.unlink()
    return Ceiling("disk write", Figure.of(rates), "MB/s", f"{WRITE_BYTES >> 20} MiB and fsync")


def _drop(path: str) -> float:
    """Asks the system to forget a file's pages; the share that it kept (1 where that cannot be told)."""
    from pipeline.loader.stages import cached_share

    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    share = cached_share((path,))
    return 1.0 if share is None else share


def _read_rate(path: str) -> float:
    """MB/s of reading a file from its begin to its end."""
    buffer = bytearray(PIECE_BYTES)
    begin, total = time.perf_counter(), 0
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total / (time.perf_counter() - begin) / 1e6
