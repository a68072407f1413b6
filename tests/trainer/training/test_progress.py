"""What a run says while it trains, and that `python -m cluster status` can read it."""

import pytest

from cluster.jobs.progress import parse
from trainer.training.metrics import TrainingProgress


@pytest.mark.parametrize(
    ("per_step_s", "left"), [(0.1, "50 s"), (1.0, "8 min"), (36.0, "5.0 h")], ids=["seconds", "minutes", "hours"]
)
def test_the_line_tells_the_time_left(
    per_step_s: float, left: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 of 600 steps were there before, 100 more are done: the pace is that of this process."""
    now = [0.0]
    monkeypatch.setattr("trainer.training.metrics.time.monotonic", lambda: now[0])
    progress = TrainingProgress(700, done=100, quiet=False)
    now[0] = 100 * per_step_s
    progress.step({"step": 200, "epoch": 1, "loss": 2.0, "images_per_s": 1580.0})
    found = parse(capsys.readouterr().out)
    assert found is not None
    assert (found.done, found.total, found.images_per_s, found.left) == (200, 700, 1580.0, left)
