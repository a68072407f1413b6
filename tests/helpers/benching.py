"""Short measurements for the benchmark's tests; module-level, so that both towers find them by name."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers.recorded_graphs import RecordedGraphs
from trainer.bench.measure import BenchSettings, Part, measure
from trainer.bench.record import BenchRecord
from trainer.bench.run import describe_workload, make_record
from trainer.bench.timing import TimedTrainer
from trainer.config import Config, load_config
from trainer.parallel.link import Ledger
from trainer.parallel.mesh import Mesh
from trainer.training.step_graph import StepRunner

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits.toml"
SMALL = (
    "model.in_channels=3", "model.channels=[4, 4, 4, 4, 4]", "model.hidden=[16, 16]", "train.batch_size=16",
)  # fmt: skip
DELAY_S = 0.05
SETTINGS = BenchSettings(seconds=0.1, rounds=2)


def recipe(*overrides: str) -> Config:
    """The digits' net, smaller, so that nothing but what a test slows down takes time."""
    return load_config(CONFIG, [*SMALL, *overrides])


def benched(
    config: Config, data: Path | None, scratch: Path, attach: Callable[[TimedTrainer], None] | None = None
) -> BenchRecord:
    """A result of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two on a busy machine wait for each other
    try:
        part = measure(
            config, dataclasses.replace(SETTINGS, data=data), mesh=None, device="cpu", scratch=scratch, attach=attach
        )
    finally:
        torch.set_num_threads(threads)
    return record_of(config, data, [part])


def record_of(config: Config, data: Path | None, parts: list[Part]) -> BenchRecord:
    """The record that the command would write."""
    settings = dataclasses.replace(SETTINGS, data=data)
    workload = describe_workload(
        config, settings, recipe="digits.toml", processes=len(parts), device="cpu", parts=parts
    )
    return make_record(config, workload, parts)


def slow_net(trainer: TimedTrainer) -> None:
    """Every forward of the net waits."""
    trainer.net.register_forward_pre_hook(lambda *_: time.sleep(DELAY_S))


class SlowLedger(Ledger):
    """Enters a crossing only after a while: what the link then sends or receives is late."""

    def add(self, kind: str, *arguments: Any) -> None:
        """As the ledger's; a swap is entered twice, for both directions."""
        if kind == "crossing":
            time.sleep(DELAY_S)
        super().add(kind, *arguments)


def bench_pair(mesh: Mesh, scratch: str) -> Part:
    """One tower's part of a synthetic benchmark, over a wire on which every crossing is delayed."""
    mesh.link.ledger = SlowLedger()
    return measure(recipe(), SETTINGS, mesh=mesh, device="cpu", scratch=Path(scratch))


def with_graphs(trainer: TimedTrainer) -> None:
    """Steps run as recorded graphs, and the host reads one step late, as on a GPU."""
    config = trainer.config.train
    trainer.verdicts.lag = 1
    trainer.work.guard = torch.ones(())
    trainer.runner = StepRunner(
        trainer.work, rows=config.batch_size, seed=config.seed, backend=RecordedGraphs(), say=lambda _: None
    )
