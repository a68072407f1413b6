"""Rows of ``scale.py``: a run's steps, evaluation, report and predictions."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from growth import Operation, fastest_ms, peak_mib

ROWS, UNITS = 128, 2048  # of a replica, of a tower in fc6 and fc7
IMAGES = 5000
CLASSES = 2000


def dropout_ms(work: Path, replicas: int) -> float:
    """The four masks of a step for the rows of the last replica."""
    import torch

    from trainer.model.layers import DropoutDraws

    torch.set_num_threads(1)
    like, first = torch.empty(ROWS, UNITS), ROWS * (replicas - 1)
    fields = {field.name for field in dataclasses.fields(DropoutDraws)}
    draws = DropoutDraws(1, 2, first, **({"total": ROWS * replicas} if "total" in fields else {}))

    def draw() -> None:
        for tower in "ab":
            for layer in ("fc6", "fc7"):
                draws.mask(tower, layer, like, 0.5)

    return fastest_ms(draw)


class _Net:
    """Says something about images without looking at them: as many logits as there are classes."""

    towers, training = ("a", "b"), False

    def __init__(self, classes: int) -> None:
        self._classes = classes

    def __call__(self, images: Any) -> Any:
        import torch

        return torch.rand(len(images), self._classes)

    def eval(self) -> None:
        """Does nothing."""

    def train(self, mode: bool) -> None:
        """Does nothing."""


def _batches(images: int, classes: int, rows: int = 20) -> Iterator[Any]:
    import torch

    for begin in range(0, images, rows):
        count = min(rows, images - begin)
        keys = tuple(f"val-{number:08d}" for number in range(begin, begin + count))
        yield SimpleNamespace(images=torch.zeros(count, 1), labels=torch.arange(count) % classes, keys=keys)


def _evaluation_mib(images: int, classes: int) -> float:
    from trainer.training.evaluate import evaluate_net

    net: Any = _Net(classes)
    evaluate_net(net, _batches(40, classes))
    return peak_mib(lambda: evaluate_net(net, _batches(images, classes)))


def evaluation_by_classes(work: Path, classes: int) -> float:
    """Memory of an evaluation of some images."""
    return _evaluation_mib(IMAGES, classes)


def evaluation_by_images(work: Path, images: int) -> float:
    """Memory of an evaluation with some classes."""
    return _evaluation_mib(images, CLASSES)


def _made_up(classes: int) -> Any:
    import numpy as np

    from trainer.training.evaluate import Evaluation

    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, classes, IMAGES), random.integers(0, classes, IMAGES)
    return Evaluation(
        num_samples=IMAGES,
        num_correct_top1=0,
        num_correct_top5=0,
        loss=1.0,
        views="center",
        keys=("k",) * IMAGES,
        labels=labels,
        predicted=predicted,
        confidence=np.ones(IMAGES, np.float32),
        in_top5=labels == predicted,
    )


def confusion_mib(work: Path, classes: int) -> float:
    """Memory of the table and the drawing of who was taken for whom."""
    from trainer.report import confusion

    found, titles = _made_up(classes), [f"class {number}" for number in range(classes)]
    confusion.draw(work / "small.png", _made_up(10), titles[:10])  # what matplotlib takes once

    def work_on() -> None:
        confusion.to_dict(found, titles)
        confusion.draw(work / "confusion.png", found, titles)

    return peak_mib(work_on)


def write_steps(run: Path, steps: int) -> Path:
    """A run folder of which only the steps are there, and an evaluation every 5,000."""
    run.mkdir(parents=True)
    figures = {"loss": 2.31234567, "learning_rate": 0.01, "images_per_s": 1234.5678, "data_wait_share": 0.0123}
    figures |= {"queue_ready_share": 0.98765, "gradient_norm": {"a": 1.2345678, "b": 2.3456789}}
    rest = json.dumps(figures)[1:]
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            place = f'{{"kind": "step", "step": {step}, "epoch": {(step - 1) // 5000}, "elapsed_s": {step * 0.5}, '
            file.write(f"{place}{rest}\n")
            if step % 5000 == 0:
                row = {"kind": "evaluation", "step": step, "epoch": step // 5000, "split": "val", "views": "center"}
                row |= {"top1": 0.5, "top5": 0.8, "loss": 2.0, "num_samples": 50000, "elapsed_s": step * 0.5}
                file.write(json.dumps(row) + "\n")
    return run


def _resume(run: Path, steps: int) -> None:
    """What rank 0 reads and writes of the steps before its first own one."""
    from trainer.config import load_config
    from trainer.training.history import read_past
    from trainer.training.metrics import MetricsLog

    recipe = Path(load_config.__code__.co_filename).parents[1] / "configs" / "digits.toml"
    config = load_config(recipe, ["train.loggers=[]"])
    past = read_past(run, steps)
    try:
        log = MetricsLog(run, config, steps, past)
    except TypeError:  # before: it read all by itself
        log = MetricsLog(run, config, steps)  # type: ignore[call-arg]
    log.close("finished")


def resume_steps_s(work: Path, steps: int) -> float:
    """Time that a resumed run takes for its metrics."""
    run = write_steps(work / "run", steps)
    return fastest_ms(lambda: _resume(run, steps), rounds=2, warm_up=0) / 1000


def resume_steps_mib(work: Path, steps: int) -> float:
    """Memory of the same."""
    _resume(write_steps(work / "small", 100), 100)
    run = write_steps(work / "run", steps)
    return peak_mib(lambda: _resume(run, steps))


def _write_report(run: Path) -> None:
    from trainer.report.report import write_report

    write_report(run)


def report_s(work: Path, steps: int) -> float:
    """Time of a report without images."""
    run = write_steps(work / "run", steps)
    return fastest_ms(lambda: _write_report(run), rounds=2, warm_up=1) / 1000


def report_mib(work: Path, steps: int) -> float:
    """Memory of the same."""
    _write_report(write_steps(work / "small", 100))
    run = write_steps(work / "run", steps)
    return peak_mib(lambda: _write_report(run))


def pages_mib(work: Path, pictures: int) -> float:
    """Memory of the pages of `predict --html`."""
    import numpy as np

    from trainer.inference.predict import html_pages
    from trainer.inference.trained_net import ClassShare, Prediction

    def write(count: int) -> None:
        pages = html_pages(work / "pages.html", work, [])
        for number in range(count):
            image = np.full((224, 224, 3), number % 256, np.uint8)
            pages.add(Prediction(Path(f"{number}.jpg"), (ClassShare(0, "cat", "cat", 0.5),), image))
        pages.close()

    write(2)
    return peak_mib(lambda: write(pictures))


STEPS = (5000, 50_000, 450_000)
OPERATIONS = [
    Operation("dropout masks, a step", "replicas", "ms", (1, 8, 64), dropout_ms, most=0, before="0.5 s at 64"),
    Operation(
        "evaluation, memory by classes", "classes", "MiB", (1000, 5000, 21_841), evaluation_by_classes,
        before="8 bytes x images x classes; now those of a batch of 20",
    ),
    Operation("evaluation, memory by images", "images", "MiB", (2000, 10_000, 50_000), evaluation_by_images),
    Operation(
        "confusion, memory", "classes", "MiB", (300, 2000, 21_841), confusion_mib, most=0.5,
        before="41 GB at 21,841 (extrapolated)",
    ),
    Operation("metrics of a resumed run, time", "steps", "s", STEPS, resume_steps_s, before="24 s at 450,000"),
    Operation(
        "metrics of a resumed run, memory", "steps", "MiB", STEPS, resume_steps_mib, most=0.2,
        before="0.9 GB at 450,000",
    ),
    Operation("report, time", "steps", "s", STEPS, report_s),
    Operation("report, memory", "steps", "MiB", STEPS, report_mib, most=0.5),
    Operation("pages of predictions, memory", "pictures", "MiB", (200, 1000, 5000), pages_mib, most=0.2),
]  # fmt: skip
