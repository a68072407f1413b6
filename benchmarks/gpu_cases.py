"""What ``gpu.py`` measures: steps of our net and of plain modules, their kernels, a bare DALI pipeline."""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from step_speed import plain_net
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pipeline.loader.open_split import open_split, read_statistics
from trainer.config import Config
from trainer.parallel.crossing import make_net
from trainer.precision import image_dtype
from trainer.training.optimizer import PaperSGD
from trainer.training.step import ForwardBackward, StepInputs, StepWork
from trainer.training.step_graph import CudaGraphs, StepRunner

Step = Callable[[int], Any]
RATE = 1e-6  # learning rate: the weights stay finite on noise


def synchronize(device: str) -> None:
    """Waits until the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def release() -> None:
    """Gives the memory of what is no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_batch(config: Config, batch: int, device: str, px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise on the scale of mean-subtracted pixels, channels_last, and labels."""
    images = torch.randn(batch, 3, px, px, device=device) * 50
    labels = torch.randint(config.model.classes, (batch,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def our_step(config: Config, batch: int, precision: str, device: str, *, graph: bool = True) -> Step:
    """One update by the trainer's own step and optimizer, without the loop around them.

    Args:
        config: the recipe.
        batch: images.
        precision: ``fp32`` or ``bf16``.
        device: ``cpu`` or ``cuda:N``.
        graph: on a GPU, as one CUDA graph after the first steps, as in training; else kernel by kernel.
    """
    train = dataclasses.replace(config.train, batch_size=batch, precision=precision)  # type: ignore[arg-type]
    net = make_net(config, None, device=device)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    gradients, on_gpu = ForwardBackward(net, train, mesh=None, device=device), device != "cpu"
    work = StepWork(net, gradients, optimizer, mesh=None, guarded=on_gpu)
    graphs = CudaGraphs(device) if on_gpu and graph else None
    runner = StepRunner(work, rows=batch, seed=train.seed, backend=graphs, say=print)
    images, labels = make_batch(config, batch, device, config.model.image_px)
    images = images.to(image_dtype(precision, device))
    return lambda number: runner(StepInputs(images, labels, lambda: (0, 0, 0), number))


def plain_step(config: Config, batch: int, precision: str, device: str, compiled: str = "") -> Step:
    """The same net of plain modules: float32 as torch comes, or bf16 autocast and channels_last.

    Args:
        config: for the number of classes.
        batch: images, of 224 px.
        precision: ``fp32`` or ``bf16``.
        device: ``cpu`` or ``cuda:N``; a CPU has no normalization in bf16, and takes float32.
        compiled: mode of ``torch.compile``; empty: eager. On a CPU its graph is run eagerly.
    """
    net, low = plain_net().to(device), precision == "bf16"
    if low:
        net = net.to(memory_format=torch.channels_last)
    images, labels = make_batch(config, batch, device, 224)
    images = images if low else images.contiguous()
    on_gpu = device != "cpu"
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, fused=on_gpu or None)
    call = net
    if compiled:
        call = torch.compile(net, mode=compiled) if on_gpu else torch.compile(net, backend="eager")

    def step(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if low and on_gpu else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()

    return step


def steps_rates(
    steps: Mapping[str, Step], batch: int, *, device: str, seconds: float, rounds: int, warm_up: int
) -> dict[str, Any]:
    """Images/s of several steps in turns; each interval is ``seconds`` long, after ``warm_up`` steps."""
    counts = {}
    for name, step in steps.items():
        for number in range(warm_up):
            step(number)
        counts[name] = max(1, round(seconds / _seconds_a_step(step, 2, device)))
    cases = {name: lambda name=name: batch / _seconds_a_step(steps[name], counts[name], device) for name in steps}
    found = harness.take_turns(cases, rounds, show=lambda rate: f"{rate:,.0f} images/s")
    return {name: harness.spread(rates) for name, rates in found.items()}


def _seconds_a_step(step: Step, count: int, device: str) -> float:
    synchronize(device)
    begin = time.perf_counter()
    for number in range(count):
        step(number)
    synchronize(device)
    return (time.perf_counter() - begin) / count


def step_kernels(step: Step, device: str, num_steps: int, most: int = 30) -> dict[str, Any]:
    """Where a step goes: its kernels (on a CPU: operations) by time, ms a step and launches a step."""
    on_gpu = device != "cpu"
    for number in range(num_steps):
        step(number)
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for number in range(num_steps):
            step(number)
        synchronize(device)
    what = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in found.key_averages() if getattr(event, what) > 0]
    events.sort(key=lambda event: -getattr(event, what))
    rows = [
        {"kernel": event.key[:110], "ms": getattr(event, what) / num_steps / 1e3, "launches": event.count / num_steps}
        for event in events
    ]
    total = {key: sum(row[key] for row in rows) for key in ("ms", "launches")}
    return total | {"kernels": rows[:most]}


def bare_dali(folder: Path, batch: int, device: str, crop_px: int, hw_load: float, mean: str) -> Iterator[Any]:
    """A hand-written DALI pipeline with the paper recipe's operators and random numbers, and nothing else.

    Args:
        folder: shards of JPEG or raw images.
        batch: images.
        device: ``cpu`` or ``cuda:N``.
        crop_px: side of a crop.
        hw_load: the hardware decoder's share.
        mean: ``image``, or ``channel``, which is one operator less.
    """
    from nvidia.dali import fn, pipeline_def, types

    split = open_split(folder, "train")
    raw, on_gpu = split.manifest.image.encoding == "raw", device != "cpu"
    side, index = split.height_px, int(device.partition(":")[2] or 0) if on_gpu else None
    mean_image = read_statistics(folder, split.manifest).mean_image
    assert mean_image is not None

    @pipeline_def(batch_size=batch, num_threads=harness.CORES, device_id=index, seed=0, prefetch_queue_depth=3)
    def pipeline() -> Any:
        encoded, labels = fn.readers.webdataset(
            paths=list(split.tars),
            index_paths=list(split.indexes),
            ext=["raw" if raw else "jpg", "cls"],
            random_shuffle=True,
            initial_fill=min(4096, split.num_samples),
            pad_last_batch=True,
        )
        if raw:
            pixels = fn.reshape(encoded.gpu() if on_gpu else encoded, shape=[side, side, 3], layout="HWC")
        elif on_gpu:
            pixels = fn.decoders.image(encoded, device="mixed", output_type=types.RGB, hw_decoder_load=hw_load)
        else:
            pixels = fn.decoders.image(encoded, output_type=types.RGB)
        window = {
            "crop": (crop_px, crop_px),
            "crop_pos_x": fn.random.uniform(range=[0.0, 1.0]),
            "crop_pos_y": fn.random.uniform(range=[0.0, 1.0]),
            "mirror": fn.random.coin_flip(),
            "std": [1.0] * 3,
            "output_layout": "CHW",
        }
        if mean == "channel":
            return fn.crop_mirror_normalize(pixels, mean=[120.0, 110.0, 100.0], **window), labels
        images = fn.crop_mirror_normalize(pixels, mean=-fn.random.normal(stddev=5.0, shape=[3]), **window)
        constant = types.Constant(
            mean_image.astype(np.float32), dtype=types.FLOAT, layout="HWC", device="gpu" if on_gpu else "cpu"
        )
        return images - fn.crop_mirror_normalize(constant, mean=[0.0] * 3, **window), labels

    built = pipeline()
    built.build()
    while True:
        yield built.run()


def batches_rate(batches: Iterator[Any], batch: int, *, seconds: float, rounds: int, settle: int) -> dict[str, Any]:
    """Images/s of something that gives batches, after ``settle`` of them."""
    for _ in range(settle):
        next(batches)
    rates = []
    for _ in range(rounds):
        begin, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begin < seconds:
            next(batches)
            count += 1
        rates.append(count * batch / (time.perf_counter() - begin))
    return harness.spread(rates)


def matrix_rates(sizes: Sequence[str], device: str, side: int) -> dict[str, float]:
    """TFLOP/s of square matrix products, by number format; and GB/s of a copy of memory, read and written."""
    found: dict[str, float] = {}
    for name in sizes:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, name == "tf32"
        a = torch.randn(side, side, device=device, dtype=dtype)
        found[name] = 2e-12 * side**3 / _best_s(lambda a=a: a @ a, device)
        torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.ones(side * side * 4, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = 2e-9 * source.nbytes / _best_s(lambda: target.copy_(source), device)
    if device != "cpu":
        host = torch.ones(side * side, pin_memory=True)
        there = host.to(device)
        found["host_to_device_gb_per_s"] = 1e-9 * host.nbytes / _best_s(lambda: there.copy_(host), device)
    return found


def _best_s(work: Callable[[], Any], device: str, repeats: int = 10) -> float:
    work()
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best
