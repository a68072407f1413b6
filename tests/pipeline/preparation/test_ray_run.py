"""How many shards are given to Ray at once, the memory they declare, and the gauges, with a Ray that only counts."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.preparation import ray_run
from pipeline.preparation.ray_run import run_shards, worker_bytes
from pipeline.preparation.shard import ShardTask
from pipeline.progress import ProgressLine
from tests.helpers.shard_data import make_job, make_tasks


class CountingRay:
    """Finishes one task a call of ``wait``; a second node of two CPUs joins after the third."""

    exceptions = ray_run.ray.exceptions

    def __init__(self, cpus: int, memory: int) -> None:
        self.cpus, self.memory = cpus, memory
        self.given: list[ShardTask] = []
        self.most = self.done = 0
        self.options_seen: dict[str, Any] = {}
        self.functions: list[str] = []

    def remote(self, function: Callable[..., object]) -> SimpleNamespace:
        def with_options(**options: Any) -> SimpleNamespace:
            self.options_seen = options
            return SimpleNamespace(remote=functools.partial(self._give, function))

        return SimpleNamespace(options=with_options)

    def put(self, job: object) -> object:
        return job

    def get(self, reference: int) -> str:
        return self.given[reference].name

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        self.most = max(self.most, len(references))
        self.done += 1
        if self.done == 3:
            self.cpus += 2
        return references[:1], references[1:]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"memory": float(self.memory)}}, {"Alive": False, "Resources": {}}]

    def _give(self, function: Callable[..., object], job: object, task: ShardTask, *parts: int) -> int:
        self.functions.append(function.__name__)
        self.given.append(task)
        return len(self.given) - 1


def run_counting(ray: CountingRay, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(ray_run, "ray", ray)
    tasks: Iterator[ShardTask] = iter(make_tasks(40, 2))
    return [str(name) for name in run_shards(make_job(folder), tasks, 20, workers=lambda: ray.cpus, tick=lambda: None)]


def test_the_bound_follows_nodes_that_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = CountingRay(cpus=1, memory=2**40)
    assert run_counting(ray, tmp_path, monkeypatch) == [task.name for task in make_tasks(40, 2)]
    assert ray.most == 3 * ray_run.TASKS_PER_WORKER
    assert ray.options_seen["memory"] == worker_bytes(make_job(tmp_path).image) == 2**29 + 2**28 + 10**9


def test_the_last_shard_goes_out_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = CountingRay(cpus=2, memory=2**40)
    monkeypatch.setattr(ray_run, "ray", ray)
    monkeypatch.setattr(ray_run.pieces, "MIN_IMAGES", 1)
    tasks = make_tasks(15, 5)
    assert list(run_shards(make_job(tmp_path), iter(tasks), 3, workers=lambda: 2, tick=lambda: None))
    assert ray.functions == (["build_piece"] * 3 + ["join_pieces"]) * 3
    assert [item for task in ray.given[:3] for item in task.items] == tasks[0].items


def test_a_small_node_is_not_asked_for_more_than_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = CountingRay(cpus=1, memory=2**26)
    run_counting(ray, tmp_path, monkeypatch)
    assert ray.options_seen["memory"] == 2**26


def test_a_cluster_without_any_cpu_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_run, "NO_CPU_S", -1.0)
    with pytest.raises(PipelineError, match="has had a CPU"):
        run_counting(CountingRay(cpus=0, memory=2**40), tmp_path, monkeypatch)


def test_gauges_tell_rate_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and labels of both gauges, with Ray's class replaced by one that remembers."""
    published: dict[str, tuple[float, dict[str, str]]] = {}

    class FakeGauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, tag_keys

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert set(tags) == set(self.keys)
            self.tags = tags

        def set(self, value: float) -> None:
            published[self.name] = (value, self.tags)

    now = [0.0]
    monkeypatch.setattr(ray_run, "Gauge", FakeGauge)
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: now[0])
    progress = ProgressLine(total=100, done=20)
    gauges = ray_run.Gauges("digits", progress)
    now[0] = 2.0
    progress.advance(30)
    gauges.update()
    labels = {"run": "digits", "stage": "prepare"}
    assert published == {"twotower_images_per_s": (15.0, labels), "twotower_images": (50, labels)}
