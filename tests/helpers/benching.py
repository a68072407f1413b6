"""Short measurements for the benchmark's tests; module-level, so that both towers find them by name."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.bench.record import BenchRecord
from trainer.bench.run import describe_setting, make_record
from trainer.bench.stages import BenchOptions, Part, measure
from trainer.bench.timing import TimedTrainer
from trainer.config import Config, load_config
from trainer.parallel.mesh import Mesh

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits.toml"
SMALL = (
    "model.channels=3", "model.maps=[4, 4, 4, 4, 4]", "model.units=[16, 16]", "train.batch_size=16",
    "data.shuffle_buffer=8",
)  # fmt: skip
DELAY_S = 0.05


def recipe(*overrides: str) -> Config:
    """The digits' net, smaller, so that nothing but what a test slows down takes time."""
    return load_config(CONFIG, [*SMALL, *overrides])


def options(data: Path | None) -> BenchOptions:
    """Two short rounds."""
    return BenchOptions(data=data, seconds=0.1, rounds=2)


def benched(
    config: Config, data: Path | None, scratch: Path, attach: Callable[[TimedTrainer], None] | None = None
) -> BenchRecord:
    """A result of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two on a busy machine wait for each other
    try:
        part = measure(config, options(data), mesh=None, device="cpu", scratch=scratch, attach=attach)
    finally:
        torch.set_num_threads(threads)
    return record_of(config, data, [part])


def record_of(config: Config, data: Path | None, parts: list[Part]) -> BenchRecord:
    """The record that the command would write."""
    setting = describe_setting(
        config, options(data), recipe="digits.toml", processes=len(parts), device="cpu", parts=parts
    )
    return make_record(config, setting, parts)


def slow_net(trainer: TimedTrainer) -> None:
    """Every forward of the net waits."""
    trainer.net.register_forward_pre_hook(lambda *_: time.sleep(DELAY_S))


def bench_pair(mesh: Mesh, scratch: str, delay_s: float) -> Part:
    """One tower's part of a synthetic benchmark, over a wire on which every crossing is delayed."""
    if delay_s:
        for method in ("swap", "send", "receive"):
            setattr(mesh.link, method, _delayed(getattr(mesh.link, method), delay_s))
    return measure(recipe(), options(None), mesh=mesh, device="cpu", scratch=Path(scratch))


def _delayed(crossing: Callable[..., Any], delay_s: float) -> Callable[..., Any]:
    def late(*arguments: Any) -> Any:
        time.sleep(delay_s)
        return crossing(*arguments)

    return late
