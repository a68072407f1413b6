"""``RUN/report.html``: what a run did, as one page that needs nothing outside itself.

Reading order: :func:`write_report` gathers, :func:`render_report` lays out; ``report_run`` reads the run folder,
``report_figures`` makes each part, ``report_charts``, ``report_pictures`` and ``drawing`` draw, ``report_page`` is the
paper they are printed on.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Manifest, read_manifest, write_atomic
from trainer.report import crossings as report_crossings
from trainer.report import figures as figures
from trainer.report import training as report_training
from trainer.report.images import PictureRow, PictureSet
from trainer.report.page import page
from trainer.report.run_data import RunRecord, read_run
from trainer.training.checkpoint import latest_checkpoint

if TYPE_CHECKING:
    from pipeline.loader.batch import Batch

REPORT_NAME = "report.html"
MOST_PICTURES = 2000  # held-out pictures run through the net for the report; accuracy figures come from the run itself
MOST_CLASSES = 20  # up to here the confusion table is drawn
NUM_FIRST, NUM_WRONG = 30, 20  # pictures shown


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        run: the run.
        pictures: predictions, or None.
        no_pictures: why there are none.
        data: one line about the data set, or empty.
    """

    run: RunRecord
    pictures: PictureSet | None = None
    no_pictures: str = ""
    data: str = ""


def write_report(run: Path, data: Path | None = None, *, device: str = "cpu") -> Path:
    """Writes ``RUN/report.html``.

    Args:
        run: run folder; may be unfinished, stopped or without checkpoint: what is missing is said in its place.
        data: data set folder, for test pictures and predictions; None leaves them out.
        device: where the net runs for them.

    Returns:
        Path of the report.

    Raises:
        TrainerError: there is no run, a file of it is damaged, or ``data`` does not fit its net.
        PipelineError: ``data`` is not a whole data set.
    """
    record = read_run(run)
    report = Report(record)
    if data is None:
        report = dataclasses.replace(report, no_pictures="No test pictures: no data set was given (--data DIR).")
    else:
        manifest = read_manifest(data)
        report = dataclasses.replace(report, data=_describe_data(data, manifest))
        if latest_checkpoint(run) is None:
            report = dataclasses.replace(report, no_pictures="No test pictures: the run has no checkpoint yet.")
        else:
            report = dataclasses.replace(report, pictures=predict_pictures(run, data, device=device))
    path = run / REPORT_NAME
    write_atomic(path, render_report(report).encode())
    return path


def render_report(report: Report) -> str:
    """The page as HTML text."""
    run = report.run
    return page(
        f"{run.folder.resolve().name}: two towers",
        [
            figures.opening(run, report.data),
            report_training.curves(run),
            report_crossings.towers(run),
            figures.kernels(run),
            figures.pictures(report.pictures, report.no_pictures),
            figures.files(run),
        ],
    )


def predict_pictures(run: Path, data: Path, *, device: str = "cpu", limit: int = MOST_PICTURES) -> PictureSet:
    """Runs the newest checkpoint over the held-out split and keeps the pictures worth showing.

    Args:
        run: run folder with a checkpoint.
        data: data set folder.
        device: where the net runs.
        limit: at most about this many pictures (whole batches), from the start of the split.

    Raises:
        TrainerError: the data set does not fit the net.
        PipelineError: the data set cannot be read.
    """
    from pipeline.loader.batches import EvaluationLoader
    from trainer.training.evaluate import evaluate_net, load_network
    from trainer.training.run_folder import check_fits

    loaded = load_network(run, device)
    net, config = loaded.net, loaded.config
    manifest = read_manifest(data)
    check_fits(config, manifest, data)
    size, split = config.train.batch_size, config.train.evaluate_split
    batches = EvaluationLoader(data, config.data, batch_size=size, split=split, device=device)
    result = evaluate_net(net, itertools.islice(batches, -(-limit // size)))
    assert result is not None  # both towers are in this process
    wrong = np.flatnonzero(result.labels != result.predicted)
    most_confident = heapq.nlargest(NUM_WRONG, wrong.tolist(), key=lambda index: (result.confidence[index], -index))
    shown = dict.fromkeys([*range(min(NUM_FIRST, result.num_samples)), *most_confident])
    plain = dataclasses.replace(config.data, mean="none", scale="255", colour="none")
    images = _images_at(EvaluationLoader(data, plain, batch_size=size, split=split), {result.keys[i] for i in shown})
    names = [record.title for record in manifest.classes]
    rows = {
        index: PictureRow(
            images[result.keys[index]],
            names[result.labels[index]],
            names[result.predicted[index]],
            float(result.confidence[index]),
        )
        for index in shown
    }
    return PictureSet(
        first=[rows[index] for index in range(min(NUM_FIRST, result.num_samples))],
        wrong=[rows[index] for index in most_confident],
        num_wrong=len(wrong),
        num_samples=result.num_samples,
        num_in_split=manifest.splits[split].num_samples,
        confusion=_count_pairs(result.labels, result.predicted, len(names)) if len(names) <= MOST_CLASSES else None,
        classes=names,
    )


def _images_at(batches: "Iterable[Batch]", keys: set[str]) -> dict[str, NDArray[np.uint8]]:
    """The pictures with these keys as the net's centre crop shows them, uint8 (H, W, C)."""
    found: dict[str, NDArray[np.uint8]] = {}
    for batch in batches:
        for key, image in zip(batch.keys, batch.images, strict=True):
            if key in keys:
                found[key] = image.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
        if len(found) == len(keys):
            break
    return found


def _count_pairs(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Pictures of class i taken for class j, shape (classes, classes)."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def _describe_data(data: Path, manifest: Manifest) -> str:
    """One line about a data set."""
    picture = manifest.picture
    sizes = f"{picture.width_px} \u00d7 {picture.height_px} px" if picture.height_px else "of many sizes"
    splits = ", ".join(f"{split.num_samples:,} {name}" for name, split in sorted(manifest.splits.items()))
    return f"{manifest.source}: {splits}; {len(manifest.classes)} classes; {picture.encoding}, {sizes} ({data})"
