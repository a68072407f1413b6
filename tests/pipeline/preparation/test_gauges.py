"""What Prometheus reads about a prepare run."""

import pytest

from pipeline.preparation import ray_run
from pipeline.progress import ProgressLine


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
    assert published == {"twotower_images_per_s": (15.0, labels), "twotower_pictures": (50, labels)}
