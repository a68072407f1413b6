"""What does it bring that a tower computes while halves cross? A step with and without, on a fast and a slow wire.

    python benchmarks/overlap.py                     about 5 minutes on 2 cores
    python benchmarks/overlap.py --batch 32 --rounds 1 --steps 1        a smoke test

Contestants, in turns within one pair of gloo processes with one thread each, the paper's net:
    together            the towers as in training
    in turns            every crossing is waited for as soon as it has begun; the same products
    in turns, again     the null: what the ratio of two equal contestants looks like here
each on this machine's own wire, and on a slow one: a message leaves so much later as it would take on a link of
``--gbit`` Gbit/s, which needs no processor. Figures are the medians over the rounds of tower a's steps. For every
crossing that tower a waits for, it also counts the processor time of what it computes meanwhile: a wire that is faster
than that costs nothing, and other processes on the machine do not change the figure.
The results go to benchmarks/results/DATE_HARDWARE_overlap.json.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from trainer.config import load_config  # noqa: E402
from trainer.model.layers import DropoutDraws  # noqa: E402
from trainer.parallel.crossing import make_net  # noqa: E402
from trainer.parallel.launch import tower_environment  # noqa: E402
from trainer.parallel.link import Link, Transfer  # noqa: E402
from trainer.parallel.mesh import connect  # noqa: E402
from trainer.training.optimizer import PaperSGD  # noqa: E402

CONTESTANTS = ("together", "in turns", "in turns, again")
WIRES = ("fast", "slow")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a contestant in a round")
    parser.add_argument("--gbit", type=float, default=1.0, help="of the slow wire, Gbit/s")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(take_turns(options)))
        return
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    children = [
        subprocess.Popen(
            command,
            env=tower_environment(rank, store.port) | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit("error: a tower failed")
    report(json.loads(outputs[0]), options)


class SlowWire:
    """Delays what a link sends, in the order in which it was sent, as a link of so many bytes a second would.

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


def take_turns(options: argparse.Namespace) -> dict[str, Any]:
    """One tower's steps: seconds by wire and contestant, by round; of a step's messages; of what is done meanwhile."""
    link = connect(300.0, "gloo").link
    step = make_step(link, options.batch)
    times: dict[str, list[list[float]]] = {f"{wire}, {name}": [] for wire in WIRES for name in CONTESTANTS}
    delayed_s, count = 0.0, 0
    for _ in range(2):  # warm-up
        timed_steps(link, step, 1, "together")
    for _ in range(options.rounds):
        for name in CONTESTANTS:
            times[f"fast, {name}"].append(timed_steps(link, step, options.steps, name))
            with SlowWire(link, options.gbit * 1e9 / 8) as slow:
                times[f"slow, {name}"].append(timed_steps(link, step, options.steps, name))
            delayed_s, count = delayed_s + slow.delayed_s, count + options.steps
    with Meanwhile(link) as meanwhile:
        timed_steps(link, step, options.rounds, "together")
    spent_ms = {name: 1e3 * statistics.median(spent) for name, spent in meanwhile.spent_s.items()}
    return {"step_s": times, "delayed_s": delayed_s / count, "meanwhile_ms": spent_ms}


def timed_steps(link: Link, step: Callable[[], None], count: int, name: str) -> list[float]:
    """Seconds of each of some steps of one contestant; both towers begin each together."""
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


def report(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the table and writes the results file."""
    rounds = {name: [statistics.median(steps) for steps in slots] for name, slots in found["step_s"].items()}
    summary: dict[str, Any] = {}
    for name, medians in rounds.items():
        ratios = [own / base for own, base in zip(medians, rounds[f"{name.split(',')[0]}, in turns"], strict=True)]
        summary[name] = {
            "step_s": statistics.median(medians),
            "step_s_range": [min(medians), max(medians)],
            "of in turns": statistics.median(ratios),
            "of in turns, range": [min(ratios), max(ratios)],
        }
        print(f"{name:24} {summary[name]['step_s']:6.3f} s  {summary[name]['of in turns']:.3f} of in turns")
    delayed = found["delayed_s"]
    for crossing, spent in found["meanwhile_ms"].items():
        print(f"{crossing:16} {spent:6.1f} ms of processor time meanwhile")
    print(f"the slow wire delays what tower a sends by {delayed:.3f} s a step")
    cores, now = len(os.sched_getaffinity(0)), datetime.datetime.now(datetime.UTC)
    read: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True}
    facts = {
        "command": " ".join(sys.argv),
        "date": f"{now:%Y-%m-%d}",
        "commit": subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **read).stdout.strip(),
        "machine": f"{platform.machine()}, {cores} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "batch": options.batch,
        "slow wire": {"gbit_per_s": options.gbit, "s a step": delayed},
        "meanwhile_ms": found["meanwhile_ms"],
        "summary": summary,
        "step_s": found["step_s"],
    }
    path = ROOT / "benchmarks" / "results" / f"{now:%Y-%m-%d}_cpu{cores}_overlap.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
