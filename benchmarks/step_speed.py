"""How fast is a training step of the paper's net beside the same net made of plain torch modules?

    python benchmarks/step_speed.py                            about 30 minutes on 2 cores
    python benchmarks/step_speed.py --batch 16 --rounds 1      a try

Cases, batch 128, synthetic images, each in a process of its own (so that peak memory is its own), in turns:

    plain        Conv2d(groups), nn.LocalResponseNorm per tower, MaxPool2d, Linear, Dropout, cross_entropy, optim.SGD,
                 eager float32
    one          one process as the trainer runs it: merged convolutions, channels_last, compiled kernels
                 (trainer/model/kernels/kernels.cpp) for the normalization and the update, float32
    one-bf16     the same with bfloat16 matrix products
    two          one process per tower, one thread each, gloo, float32
    two-bf16     the same with bfloat16 matrix products
    one-torch    ``one`` with TWOTOWER_KERNELS=off: what a machine without a C++ compiler does
    norm-plain   nn.LocalResponseNorm(5) forward and backward, (128, 48, 55, 55) float32
    norm         trainer.model.response_norm on the same, channels_last
    norm-torch   the same with TWOTOWER_KERNELS=off

The trainer asks for huge pages for large tensors (``trainer/__init__.py``); the plain contestants have what torch comes
with, small ones. Each process does two steps that are not counted, then several that are; the figure of a round is
their median.
Results: benchmarks/results/DATE_MACHINE_step_speed.json.
"""

import argparse
import contextlib
import functools
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

from harness import (
    CORES,
    ROOT,
    describe_machine,
    make_parser,
    ratio,
    run_in_processes,
    spread,
    take_turns,
    write_results,
)

CASES = ("plain", "one", "one-bf16", "one-torch", "two", "two-bf16", "norm-plain", "norm", "norm-torch")
WARM_UP = 2
NORM_STEPS = 8  # counted steps of the normalization alone for one of the net: they are short


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a process")
    parser.add_argument("--only", default=",".join(CASES), metavar="CASE,CASE")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options.batch, options.steps)))
        return
    machine = describe_machine("torch")
    cases = {name: functools.partial(start, name, options) for name in options.only.split(",")}
    rows = take_turns(cases, options.rounds, show=lambda row: f"{row['images_per_s']:,.1f} images/s")
    rates = {name: [row["images_per_s"] for row in found] for name, found in rows.items()}
    summary = {}
    for name in rows:
        reference = "norm-plain" if name.startswith("norm") else "plain"
        times = ratio(rates[name], rates[reference]) if reference in rates else None
        peak_mib = max(row["peak_mib"] for row in rows[name])
        summary[name] = {"images_per_s": spread(rates[name]), "times_plain": times, "peak_mib": peak_mib}
        shown = f"{times['median']:.2f} x plain" if times else ""
        print(f"{name:12} {statistics.median(rates[name]):8.1f} images/s  {shown:14} {peak_mib:7.0f} MiB")
    write_results(options.results, machine, {"batch": options.batch, "summary": summary, "rounds": rows})


def start(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs one case in a process (or a pair); rank 0 reports, peak memory is the sum of the pair's."""
    pair = name.startswith("two")
    environment = {"OMP_NUM_THREADS": str(max(1, CORES // (1 + pair)))}
    environment |= {"TWOTOWER_KERNELS": "off"} if name.endswith("-torch") else {}
    environment |= {"THP_MEM_ALLOC_ENABLE": "0"} if name.endswith("plain") else {}
    arguments = ("--case", name, "--batch", options.batch, "--steps", options.steps)
    results = run_in_processes(arguments, pair=pair, environment=environment)
    return results[0] | {"peak_mib": sum(result["peak_mib"] for result in results)}


def run_case(name: str, batch: int, steps: int) -> dict[str, float]:
    """Median seconds of a step and this process's peak memory."""
    alone = name.startswith("norm")
    step = norm_step(name, batch) if alone else net_step(name, batch)
    steps *= NORM_STEPS if alone else 1
    times = []
    for number in range(WARM_UP + steps):
        begin = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "step_s": statistics.median(times[WARM_UP:]),
        "images_per_s": batch / statistics.median(times[WARM_UP:]),
        "peak_mib": peak,
    }


def net_step(name: str, batch: int) -> Callable[[int], None]:
    """One update of the whole net."""
    import torch

    from trainer.config import load_config
    from trainer.model.layers import DropoutDraws
    from trainer.parallel.crossing import make_net
    from trainer.parallel.mesh import connect
    from trainer.training.optimizer import PaperSGD

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator) * 50
    labels = torch.randint(1000, (batch,), generator=generator)
    if name == "plain":
        return plain_step(images, labels)
    config = load_config(ROOT / "configs" / "paper.toml")
    link = connect(300.0, "gloo").link if name.startswith("two") else None
    net = make_net(config, link)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    images = images.contiguous(memory_format=torch.channels_last)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        narrow = torch.autocast("cpu", torch.bfloat16) if "bf16" in name else contextlib.nullcontext()
        with narrow:
            loss = net.loss(images, labels, DropoutDraws(0, number))
        loss.backward()
        optimizer.step()

    return step


def plain_net() -> Any:
    """The net as one writes it with torch's modules."""
    import torch
    from torch import nn

    class TowerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.norm(half) for half in x.chunk(2, dim=1)], dim=1)

    def convolution(inputs: int, maps: int, side: int, **more: Any) -> list[nn.Module]:
        return [nn.Conv2d(inputs, maps, side, **more), nn.ReLU(inplace=True)]

    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)),
        *convolution(3, 96, 11, stride=4),
        TowerNorm(),
        nn.MaxPool2d(3, 2),
        *convolution(96, 256, 5, padding=2, groups=2),
        TowerNorm(),
        nn.MaxPool2d(3, 2),
        *convolution(256, 384, 3, padding=1),
        *convolution(384, 384, 3, padding=1, groups=2),
        *convolution(384, 256, 3, padding=1, groups=2),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        *(nn.Linear(9216, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        nn.Linear(4096, 1000),
    )


def plain_step(images: Any, labels: Any) -> Callable[[int], None]:
    """One update of it."""
    import torch
    from torch import nn

    net = plain_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

    return step


def norm_step(name: str, batch: int) -> Callable[[int], None]:
    """Forward and backward of the response normalization alone."""
    import torch

    from trainer.model.response_norm import response_norm

    layout = torch.contiguous_format if name == "norm-plain" else torch.channels_last
    x = (torch.randn(batch, 48, 55, 55) * 30).contiguous(memory_format=layout).requires_grad_()
    gradient = torch.randn(batch, 48, 55, 55).contiguous(memory_format=layout)
    module = torch.nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0)

    def step(_: int) -> None:
        x.grad = None
        y = module(x) if name == "norm-plain" else ours(x)
        y.backward(gradient)

    return step


if __name__ == "__main__":
    main()
