"""Two towers that share their decoding: what the trainer asks the loader for, says of it, and measures."""

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.recipes import recipe
from trainer.bench.measure import BenchSettings, Part
from trainer.bench.run import describe_workload
from trainer.parallel.link import Link
from trainer.training import loop
from trainer.training.loop import Trainer


@pytest.mark.parametrize(("backend", "between"), [("nccl", True), ("gloo", False)])
def test_only_gpus_that_talk_directly_share_by_default(
    backend: str, between: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader is told; and for which device and precision it makes its images."""
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    link = Link("b", 0, None, None, None)  # type: ignore[arg-type]
    asked: dict[str, Any] = {}
    monkeypatch.setattr(loop, "TrainingLoader", lambda *_, **words: asked.update(words))
    trainer = types.SimpleNamespace(
        link=link, data=None, config=recipe("digits", "train.precision=bf16"), device="cuda:1", skip_list=None,
        coord=types.SimpleNamespace(rank=1, replica=0, replicas=1),
    )  # fmt: skip
    Trainer._open_loader(trainer, None)  # type: ignore[arg-type]
    feed = asked["split_feed"]
    assert (feed.part, feed.parts, feed.between_gpus) == (1, 2, between)
    assert asked["dtype"] == torch.bfloat16


@pytest.mark.parametrize("shared", [False, True])
def test_the_first_line_says_who_decodes(shared: bool) -> None:
    trainer = types.SimpleNamespace(
        link=object(), loader=types.SimpleNamespace(shares_decoding=shared), config=recipe("digits"), device="cuda:0",
        coord=types.SimpleNamespace(replicas=1), step=0, steps_per_epoch=7,
    )  # fmt: skip
    line = Trainer._opening_line(trainer)  # type: ignore[arg-type]
    assert ("two processes, one per tower, decoding shared between them, cuda:0" in line) == shared


@pytest.mark.parametrize("shared", [False, True])
def test_a_benchmark_tells_what_was_decided(shared: bool) -> None:
    """Not what the recipe says, which may be ``auto``."""
    part = Part("a", shares_decoding=shared)
    workload = describe_workload(
        recipe("digits"), BenchSettings(), recipe="digits.toml", processes=2, device="cpu", parts=[part, part]
    )
    assert workload.decode == ("sharded" if shared else "replicated")
