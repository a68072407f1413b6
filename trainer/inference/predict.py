"""What a run's net says about images that are in no data set: as a table, as lines of JSON, and as a page."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.nn import functional

from pipeline.errors import ImageError
from pipeline.loader.image_reader import ImageReader
from pipeline.manifest import read_manifest, write_atomic
from trainer.errors import RunError
from trainer.report.page import percent, render
from trainer.training.evaluate import load_network
from trainer.training.kept_data import compare_data, data_of
from trainer.training.fit import check_fits

SHOWN_IN_TABLE = 3  # classes beside the likeliest one that a table row has room for


@dataclasses.dataclass(frozen=True)
class ClassShare:
    """One class and its probability.

    Attributes:
        label: the class's label.
        name: the source's own id of it.
        title: its name for people.
        probability: 0..1.
    """

    label: int
    name: str
    title: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What was said about one image, or why nothing was.

    Attributes:
        path: the file.
        classes: the likeliest classes, likeliest first; empty where the image could not be used.
        image: the center crop that the net looked at, uint8 (S, S, C), or None.
        error: why the image could not be used; empty where it could.
    """

    path: Path
    classes: tuple[ClassShare, ...] = ()
    image: np.ndarray | None = None
    error: str = ""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and in place of a folder every file in it that is not hidden, at any depth, by name.

    What a file is, its content tells later, not its name: as in preparing a folder.

    Raises:
        RunError: a folder has no files.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        if not inside:
            raise RunError(f"{path} has no files in it: name images, or a folder of them")
        found += inside
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class Predictor:
    """A checkpoint of a run, ready to look at images.

    Args:
        run: run folder.
        data: data set whose preparation applies; None for the one that the run was trained on.
        device: where the net runs.
        views: ``center``, or ``ten`` whose softmax outputs are averaged (paper section 4.1).
        which: see :func:`trainer.training.checkpoint.choose`.

    Raises:
        TrainerError: no run, no checkpoint, or a data set that does not fit the net.
        PipelineError: there is no complete data set.
    """

    def __init__(
        self,
        run: Path,
        data: Path | None = None,
        *,
        device: str = "cpu",
        views: str = "center",
        which: str = "newest",
    ) -> None:
        loaded = load_network(run, device, which=which)
        self._net, self._config = loaded.net, loaded.config
        data = data or data_of(run)
        manifest = read_manifest(data)
        check_fits(self._config, manifest, data, splits=())
        statistics = compare_data(run, data, manifest)
        self._reader = ImageReader(data, self._config.data, views=views, device=device, statistics=statistics)
        self._ten = views == "ten"

    def predict(self, paths: Iterable[Path], *, top: int = 5, images: bool = True) -> Iterator[Prediction]:
        """Predicts images in batches; a file that cannot be used is a :class:`Prediction` with its error.

        Args:
            paths: files, in the order in which predictions come.
            top: classes an image, >= 1.
            images: whether predictions carry their images; without, a folder of any size takes no more memory.
        """
        waiting: list[Prediction] = []
        for path in paths:
            try:
                waiting.append(Prediction(path, image=self._reader.read(path)))
            except ImageError as error:
                waiting.append(Prediction(path, error=str(error)))
            if len(waiting) == self._config.train.batch_size:
                yield from self._answer(waiting, top, images)
                waiting = []
        yield from self._answer(waiting, top, images)

    def _answer(self, waiting: Sequence[Prediction], top: int, images: bool) -> Iterator[Prediction]:
        """Fills in the classes of the images of one batch; their ``image`` is the stored image until then."""
        stored = [prediction.image for prediction in waiting if prediction.image is not None]
        rows = iter(self._shares(stored) if stored else ())
        for prediction in waiting:
            if prediction.image is None:
                yield prediction
                continue
            classes = self._likeliest(next(rows), top)
            image = self._reader.center(prediction.image).copy() if images else None
            yield dataclasses.replace(prediction, classes=classes, image=image)

    @torch.no_grad()
    def _shares(self, stored: Sequence[np.ndarray]) -> torch.Tensor:
        """Probabilities of stored images, (N, classes) on the CPU."""
        images = self._reader.images(stored)
        if not self._ten:
            return functional.softmax(self._net(images).float(), dim=1).cpu()
        shares = functional.softmax(self._net(images.flatten(0, 1)).float(), dim=1)
        return shares.unflatten(0, (-1, images.shape[1])).mean(1).cpu()

    def _likeliest(self, shares: torch.Tensor, top: int) -> tuple[ClassShare, ...]:
        """The ``top`` likeliest classes of one image's (classes,) probabilities."""
        records = self._reader.manifest.classes
        values, labels = shares.topk(min(max(1, top), len(records)))
        return tuple(
            ClassShare(label, records[label].name, records[label].title, value)
            for label, value in zip(labels.tolist(), values.tolist(), strict=True)
        )


def print_table(results: Sequence[Prediction]) -> None:
    """Prints a row for each image that could be used."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("likeliest", overflow="fold")
    table.add_column("", justify="right")
    table.add_column("then", overflow="fold")
    for result in results:
        if result.error:
            continue
        first, *others = result.classes
        then = ", ".join(f"{share.title} {percent(share.probability)}" for share in others[:SHOWN_IN_TABLE])
        table.add_row(escape(str(result.path)), escape(first.title), percent(first.probability), escape(then))
    if table.row_count:  # in a file or a pipe no row is broken, so that grep finds a name
        Console(width=None if Console().is_terminal else 10_000).print(table)


def print_json(result: Prediction) -> None:
    """Prints a JSON object: ``image`` and either ``classes``, the likeliest first, or ``error``."""
    row: dict[str, object] = {"image": str(result.path)}
    if result.error:
        row["error"] = result.error
    else:
        row["classes"] = [dataclasses.asdict(share) for share in result.classes]
    print(json.dumps(row, ensure_ascii=False), flush=True)


def print_error(result: Prediction) -> None:
    """Prints a line on stderr where the image could not be used."""
    if result.error:
        print(f"error: {result.path}: {result.error}", file=sys.stderr)


def write_html(path: Path, results: Sequence[Prediction], run: Path) -> None:
    """Writes a self-contained page with every image as the net saw it, and what it said.

    Raises:
        RunError: the file cannot be written.
    """
    template = Path(__file__).with_name("predictions.html.j2")
    page = render(
        template,
        name=run.resolve().name,
        used=[result for result in results if not result.error],
        refused=[result for result in results if result.error],
    )
    try:
        write_atomic(path, page.encode())
    except OSError as error:
        raise RunError(f"--html {path} cannot be written: {error.strerror}") from None
