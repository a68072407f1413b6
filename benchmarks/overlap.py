"""What does it bring that a tower computes while halves cross? A step with and without, on a fast and a slow wire.

    python benchmarks/overlap.py                     about 5 minutes on 2 cores
    python benchmarks/overlap.py --batch 32 --rounds 1 --steps 1        a smoke test

Cases, in turns within one pair of gloo processes with one thread each, the paper's net:
    together            the towers as in training
    in turns            every crossing is waited for as soon as it has begun; the same products
    in turns, again     the null: what the ratio of two equal cases looks like here
each on this machine's own wire, and on a slow one: a message leaves so much later as it would take on a link of
``--gbit`` Gbit/s, which needs no processor. Figures are the medians over the rounds of tower a's steps. For every
crossing that tower a waits for, it also counts the processor time of what it computes meanwhile: a wire that is faster
than that costs nothing, and other processes on the machine do not change the figure.
The results go to benchmarks/results/DATE_MACHINE_overlap.json.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from harness import ROOT, describe_machine, make_parser, ratio, run_in_processes, spread, take_turns, write_results

from trainer.config import load_config
from trainer.model.layers import DropoutDraws
from trainer.parallel.crossing import make_net
from trainer.parallel.link import Link, Transfer
from trainer.parallel.mesh import connect
from trainer.training.optimizer import PaperSGD

CASES = ("together", "in turns", "in turns, again")


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a case in a round")
    parser.add_argument("--gbit", type=float, default=1.0, help="of the slow wire, Gbit/s")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options)
        return
    machine = describe_machine("torch")
    arguments = [f"--{name}={getattr(options, name)}" for name in ("rounds", "batch", "steps", "gbit")]
    found, _ = run_in_processes([*arguments, "--child"], pair=True, environment={"OMP_NUM_THREADS": "1"})
    medians = {name: [statistics.median(steps) for steps in rounds] for name, rounds in found["step_s"].items()}
    summary = {}
    for name, own in medians.items():
        times = ratio(own, medians[f"{name.split(',')[0]}, in turns"])
        summary[name] = {"step_s": spread(own), "of in turns": times}
        print(f"{name:24} {statistics.median(own):6.3f} s  {times['median']:.3f} of in turns")
    for crossing, spent in found["meanwhile_ms"].items():
        print(f"{crossing:16} {spent:6.1f} ms of processor time meanwhile")
    print(f"the slow wire delays what tower a sends by {found['delayed_s']:.3f} s a step")
    slow = {"gbit_per_s": options.gbit, "s a step": found.pop("delayed_s")}
    write_results(options.results, machine, {"batch": options.batch, "slow wire": slow, "summary": summary, **found})


class SlowWire:
    """Delays what a link sends, in the order in which it was sent, as a link of so many bytes per second would.

    Attributes:
        delayed_s: seconds that messages took so far, all together.
    """

    def __init__(self, link: Link, bytes_per_s: float) -> None:
        self._link, self._rate, self.delayed_s = link, bytes_per_s, 0.0
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._post = dist.batch_isend_irecv

    def __enter__(self) -> "SlowWire":
        dist.batch_isend_irecv = self._later
        return self

    def __exit__(self, *_: object) -> None:
        dist.batch_isend_irecv = self._post

    def _later(self, operations: Sequence[dist.P2POp]) -> list[Any]:
        """Posts messages once the wire had time for them; a message that only comes in is posted at once."""
        out_bytes = sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        self.delayed_s += out_bytes / self._rate
        return [_Posted(self._thread.submit(self._travel, operations, out_bytes / self._rate))]

    def _travel(self, operations: Sequence[dist.P2POp], seconds: float) -> list[Any]:
        time.sleep(seconds)
        return self._post(list(operations))


class _Posted:
    """The handle of messages that leave later."""

    def __init__(self, posting: "concurrent.futures.Future[list[Any]]") -> None:
        self._posting = posting

    def wait(self) -> None:
        for work in self._posting.result():
            work.wait()


class Meanwhile:
    """Processor time of this thread between a crossing's start and the waiting for it, by crossing, s."""

    def __init__(self, link: Link) -> None:
        self.spent_s: dict[str, list[float]] = {}
        self._started_s: dict[str, float] = {}
        self._link, self._inner = link, {name: getattr(link, name) for name in ("exchange", "irecv", "wait")}

    def __enter__(self) -> "Meanwhile":
        for name in ("exchange", "irecv"):
            setattr(self._link, name, self._starting(self._inner[name]))
        self._link.wait = self._wait  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._inner:
            delattr(self._link, name)  # the class's own again

    def _starting(self, start: Callable[..., Transfer]) -> Callable[..., Transfer]:
        def started(*arguments: Any) -> Transfer:
            crossing = start(*arguments)
            self._started_s[crossing.name] = time.thread_time()
            return crossing

        return started

    def _wait(self, crossing: Transfer) -> torch.Tensor:
        self.spent_s.setdefault(crossing.name, []).append(time.thread_time() - self._started_s[crossing.name])
        return self._inner["wait"](crossing)


def wait_at_once(link: Link) -> None:
    """Nothing is computed while anything crosses."""
    for name in ("exchange", "isend", "irecv"):
        setattr(link, name, _waiting(link, getattr(link, name)))


def _waiting(link: Link, start: Callable[..., Transfer]) -> Callable[..., Transfer]:
    def crossed(*arguments: Any) -> Transfer:
        crossing = start(*arguments)
        link.wait(crossing)
        return crossing

    return crossed


def measure(options: argparse.Namespace) -> None:
    """One tower's steps: seconds by wire and case; of a step's messages; of what is done meanwhile. Tower a prints."""
    link = connect(300.0, "gloo").link
    step = make_step(link, options.batch)
    for _ in range(2):
        timed_steps(link, step, 1, "together")  # warm-up
    delays: list[float] = []
    cases: dict[str, Callable[[], list[float]]] = {}
    for name in CASES:
        cases[f"fast, {name}"] = functools.partial(timed_steps, link, step, options.steps, name)
        cases[f"slow, {name}"] = functools.partial(slow_steps, cases[f"fast, {name}"], link, options, delays)
    with contextlib.redirect_stdout(sys.stderr if link.tower == "a" else None):  # stdout is for the result
        times = take_turns(cases, options.rounds, show=lambda steps: f"{statistics.median(steps):.3f} s")
    with Meanwhile(link) as meanwhile:
        timed_steps(link, step, options.rounds, "together")
    spent_ms = {name: 1e3 * statistics.median(spent) for name, spent in meanwhile.spent_s.items()}
    print(json.dumps({"step_s": times, "delayed_s": statistics.mean(delays), "meanwhile_ms": spent_ms}))


def slow_steps(
    steps: Callable[[], list[float]], link: Link, options: argparse.Namespace, delays: list[float]
) -> list[float]:
    """The same on the slow wire; adds to ``delays`` what it delayed a step by, in seconds."""
    with SlowWire(link, options.gbit * 1e9 / 8) as slow:
        times = steps()
    delays.append(slow.delayed_s / options.steps)
    return times


def timed_steps(link: Link, step: Callable[[], None], count: int, name: str) -> list[float]:
    """Seconds of each of some steps of one case; both towers begin each together."""
    if name != "together":
        wait_at_once(link)
    times = []
    for _ in range(count):
        link.control([0, 0, 0])
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    for method in ("exchange", "isend", "irecv"):
        if name != "together":
            delattr(link, method)  # the class's own again
    return times


def make_step(link: Link, batch: int) -> Callable[[], None]:
    """One update of this tower of the paper's net, on noise, with a rate that leaves the weights finite."""
    config = load_config(ROOT / "configs" / "paper.toml", ["optimizer.learning_rate=1e-6"])
    net = make_net(config, link)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator) * 50
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), generator=generator)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net.loss(images, labels, DropoutDraws(0, 0)).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
