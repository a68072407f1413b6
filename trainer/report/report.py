"""``RUN/report.html``: what a run did, as one page that needs nothing outside itself.

:func:`write_report` gathers: ``run_data`` reads the run folder, :func:`predict_images` asks the newest checkpoint.
``figures`` and ``confusion`` draw. The page's words and order are in ``report.html.j2``, its look in ``page.css``.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Manifest, read_manifest, write_atomic
from trainer.report import figures
from trainer.report.confusion import confusion_svg, count_pairs
from trainer.report.net_drawing import format_bytes
from trainer.report.page import ENVIRONMENT, render
from trainer.report.run_data import RunRecord, facts, headline, read_run
from trainer.training.checkpoint import latest_checkpoint
from twotower.words import pluralize

if TYPE_CHECKING:
    from pipeline.loader.batch import Batch

REPORT_NAME = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_IMAGES = 2000  # held-out images run through the net for the report; accuracy figures come from the run itself
MOST_CLASSES = 20  # up to here the confusion matrix is drawn
NUM_FIRST, NUM_WRONG = 30, 20  # images shown
FILES = {
    "config.toml": "the resolved recipe: the run can be repeated from it alone",
    "environment.json": "commit, versions, machine",
    "metrics.jsonl": "{steps} and {evaluations}, one JSON object a line",
    "epochs.csv": "a line per epoch, for spreadsheets",
    "result.json": "final figures and how the run ended",
    "tensorboard": "the same curves: tensorboard --logdir RUN/tensorboard",
    "loggers": "what Weights & Biases or MLflow keep of the run",
    "checkpoints": "weights and velocities, one safetensors file per tower",
}
ENVIRONMENT.filters |= {
    "bytes": format_bytes,
    "kernel_sheet": figures.kernel_sheet,
    "color_share": figures.color_share,
}


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """One test image and what the net said.

    Attributes:
        image: uint8, shape (H, W, 1 or 3).
        label: name of the true class.
        predicted: name of the class with the greatest probability.
        confidence: that probability, 0..1.
    """

    image: NDArray[np.uint8]
    label: str
    predicted: str
    confidence: float

    @property
    def wrong(self) -> bool:
        """Whether the prediction is not the label."""
        return self.label != self.predicted


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """What was predicted for a split.

    Attributes:
        first: the first images of the split, right or wrong: not a selection.
        wrong: images predicted wrongly, the most confident first.
        num_wrong: wrong ones in all.
        num_samples: images predicted, from the start of the split.
        num_in_split: images in the split.
        confusion: images of class i taken for class j, shape (C, C); None where there are too many classes to draw.
        classes: names of the classes in label order.
    """

    first: Sequence[ImageRow]
    wrong: Sequence[ImageRow]
    num_wrong: int
    num_samples: int
    num_in_split: int
    confusion: NDArray[np.int64] | None = None
    classes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        run: the run.
        images: predictions, or None.
        no_images: why there are none.
        data: one line about the data set, or empty.
    """

    run: RunRecord
    images: ImageSet | None = None
    no_images: str = ""
    data: str = ""


def write_report(run: Path, data: Path | None = None, *, device: str = "cpu") -> Path:
    """Writes ``RUN/report.html``.

    Args:
        run: run folder; may be unfinished, stopped or without checkpoint: what is missing is said in its place.
        data: data set folder, for test images and predictions; None leaves them out.
        device: where the net runs for them.

    Returns:
        Path of the report.

    Raises:
        TrainerError: there is no run, a file of it is damaged, or ``data`` does not fit its net.
        PipelineError: ``data`` is not a complete data set.
    """
    record = read_run(run)
    report = Report(record)
    if data is None:
        report = dataclasses.replace(report, no_images="No test images: no data set was given (--data DIR).")
    else:
        manifest = read_manifest(data)
        report = dataclasses.replace(report, data=_describe_data(data, manifest))
        if latest_checkpoint(run) is None:
            report = dataclasses.replace(report, no_images="No test images: the run has no checkpoint yet.")
        else:
            report = dataclasses.replace(report, images=predict_images(run, data, device=device))
    path = run / REPORT_NAME
    write_atomic(path, render_report(report).encode())
    return path


def render_report(report: Report) -> str:
    """The page as HTML text."""
    run, found = report.run, report.images
    model = run.config.model if run.config else None
    words = {
        "steps": pluralize(run.steps.num, "step"),
        "evaluations": pluralize(len(run.evaluations), "evaluation"),
    }
    return render(
        TEMPLATE,
        run=run,
        result=run.result,
        name=run.folder.resolve().name,
        towers="one tower" if model and model.towers == 1 else "two towers",
        headline=headline(run),
        facts=facts(run, report.data),
        curves=figures.curves(run),
        traffic=figures.traffic_of(run),
        color=any(weight.shape[1] == 3 for weight in run.kernels.values()),
        images=found,
        no_images=report.no_images,
        confusion=confusion_svg(found.confusion, found.classes) if found and found.confusion is not None else "",
        paths=[(path, what.format(**words)) for path, what in FILES.items() if (run.folder / path).exists()],
    )


def predict_images(run: Path, data: Path, *, device: str = "cpu", limit: int = MOST_IMAGES) -> ImageSet:
    """Runs the newest checkpoint over the held-out split and keeps the images worth showing.

    Args:
        run: run folder with a checkpoint.
        data: data set folder.
        device: where the net runs.
        limit: at most about this many images (whole batches), from the start of the split.

    Raises:
        TrainerError: the data set does not fit the net.
        PipelineError: the data set cannot be read.
    """
    from pipeline.loader.batches import EvaluationLoader
    from trainer.training.evaluate import evaluate_net, load_network
    from trainer.training.fit import check_fits
    from trainer.training.kept_data import compare_data

    loaded = load_network(run, device)
    net, config = loaded.net, loaded.config
    manifest = read_manifest(data)
    size, split = config.train.batch_size, config.train.evaluate_split
    check_fits(config, manifest, data, splits=(split,))
    statistics = compare_data(run, data, manifest)
    batches = EvaluationLoader(data, config.data, batch_size=size, split=split, device=device, statistics=statistics)
    result = evaluate_net(net, itertools.islice(batches, -(-limit // size)))
    assert result is not None  # both towers are in this process
    wrong = np.flatnonzero(result.labels != result.predicted)
    most_confident = heapq.nlargest(NUM_WRONG, wrong.tolist(), key=lambda index: (result.confidence[index], -index))
    shown = dict.fromkeys([*range(min(NUM_FIRST, result.num_samples)), *most_confident])
    plain = dataclasses.replace(config.data, mean="none", normalize="none", color="none")
    shown_batches = EvaluationLoader(data, plain, batch_size=size, split=split, statistics=statistics)
    images = _images_at(shown_batches, {result.keys[i] for i in shown})
    names = [record.title for record in manifest.classes]
    rows = {
        index: ImageRow(
            images[result.keys[index]],
            names[result.labels[index]],
            names[result.predicted[index]],
            float(result.confidence[index]),
        )
        for index in shown
    }
    return ImageSet(
        first=[rows[index] for index in range(min(NUM_FIRST, result.num_samples))],
        wrong=[rows[index] for index in most_confident],
        num_wrong=len(wrong),
        num_samples=result.num_samples,
        num_in_split=manifest.splits[split].num_samples,
        confusion=count_pairs(result, len(names)) if len(names) <= MOST_CLASSES else None,
        classes=names,
    )


def _images_at(batches: "Iterable[Batch]", keys: set[str]) -> dict[str, NDArray[np.uint8]]:
    """The images with these keys as the net's center crop shows them, uint8 (H, W, C)."""
    found: dict[str, NDArray[np.uint8]] = {}
    for batch in batches:
        for key, image in zip(batch.keys, batch.images, strict=True):
            if key in keys:
                found[key] = image.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
        if len(found) == len(keys):
            break
    return found


def _describe_data(data: Path, manifest: Manifest) -> str:
    """One line about a data set."""
    image = manifest.image
    sizes = f"{image.width_px} \u00d7 {image.height_px} px" if image.height_px else "of many sizes"
    splits = ", ".join(f"{split.num_samples:,} {name}" for name, split in sorted(manifest.splits.items()))
    classes = pluralize(len(manifest.classes), "class")
    return f"{manifest.source}: {splits}; {classes}; {image.encoding}, {sizes} ({data})"
