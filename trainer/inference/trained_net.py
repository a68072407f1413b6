"""A trained net in Python: what ``predict``, ``features`` and ``neighbours`` use, and what a notebook imports.

    from trainer.inference import load

    net = load("runs/photos")
    for prediction in net.classify(["cat.jpg", "dog.jpg"]):
        print(prediction.path, prediction.classes[0].title, prediction.classes[0].probability)
    codes = net.features(["cat.jpg", "dog.jpg"], "fc7")  # (2, 512) float32

Every picture goes one way, :class:`pipeline.loader.image_reader.ImageReader`; exported files carry the same rule.
"""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ImageError
from pipeline.loader.image_reader import ImageReader, Picture
from pipeline.manifest import ClassRecord, read_manifest
from trainer.config import LAYERS
from trainer.errors import RunError
from trainer.inference.input_rule import InputRule, rule_of
from trainer.model.gpu_layers import join
from trainer.model.kernels.interface import TowerMaps
from trainer.training.evaluate import load_network
from trainer.training.fit import check_fits
from trainer.training.kept_data import compare_data, data_of

BATCH_VALUES = (
    50_000_000  # most float32 values of a batch's images, so that a batch of large crops does not fill memory
)


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
        path: the file, or ``picture N`` (from 0) where it was none.
        classes: the likeliest classes, likeliest first; empty where the image could not be used.
        image: the center crop that the net looked at, uint8 (S, S, C), or None.
        error: why the image could not be used; empty where it could.
    """

    path: Path
    classes: tuple[ClassShare, ...] = ()
    image: np.ndarray | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class FeatureRow:
    """What a layer says about one image, or why nothing.

    Attributes:
        path: as of :class:`Prediction`.
        values: float32 (units,) or (maps, H, W), or None.
        image: as of :class:`Prediction`.
        error: as of :class:`Prediction`.
    """

    path: Path
    values: np.ndarray | None = None
    image: np.ndarray | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class _Read:
    """A picture of a batch: its stored image, or why there is none."""

    path: Path
    stored: np.ndarray | None
    error: str


class TrainedNet:
    """A checkpoint of a run, ready to look at pictures; made by :func:`load`.

    A picture is the path of a file, its bytes, a Pillow image, or an uint8 array (H, W), (H, W, 1) or (H, W, 3), red
    first; it is turned upright, resized and cropped as the run's data set was.

    Attributes:
        config: the run's recipe.
        step: updates that the checkpoint has seen.
        classes: the class table; the place is the label.
    """

    def __init__(
        self, run: Path, data: Path | None = None, *, device: str = "cpu", views: str = "center", which: str = "newest"
    ) -> None:
        loaded = load_network(run, device, which=which)
        self.config, self.step, self._net = loaded.config, loaded.step, loaded.net
        data = data or data_of(run)
        manifest = read_manifest(data)
        check_fits(self.config, manifest, data, splits=())
        statistics = compare_data(run, data, manifest)
        self._reader = ImageReader(data, self.config.data, views=views, device=device, statistics=statistics)
        self._centers = ImageReader(data, self.config.data, device=device, statistics=statistics)
        self.classes: tuple[ClassRecord, ...] = manifest.classes
        values = self.config.model.in_channels * self.config.model.image_px**2 * (10 if views == "ten" else 1)
        self._batch_size = max(1, min(self.config.train.batch_size, BATCH_VALUES // values))

    @property
    def input_rule(self) -> InputRule:
        """How a picture becomes the net's input, in numbers and words."""
        return rule_of(self._centers, self.config)

    def preprocess(self, pictures: Picture | Iterable[Picture]) -> Tensor:
        """What the net sees: float32 (N, C, S, S), on the net's device.

        Raises:
            ImageError: a picture cannot be used.
        """
        return self._centers.images([self._centers.read(picture) for picture in _many(pictures)])

    def crop(self, picture: Picture) -> np.ndarray:
        """The center crop of one picture, uint8 (S, S, C): the input of an exported file.

        Raises:
            ImageError: it cannot be used.
        """
        return self._centers.center(self._centers.read(picture)).copy()

    def classify(self, pictures: Picture | Iterable[Picture], *, top: int = 5) -> list[Prediction]:
        """The likeliest classes of every picture, in their order; one that cannot be used has its ``error``."""
        return list(self.predict(pictures, top=top))

    def predict(
        self, pictures: Picture | Iterable[Picture], *, top: int = 5, images: bool = True
    ) -> Iterator[Prediction]:
        """:meth:`classify`, batch by batch.

        Args:
            pictures: any number, in the order in which predictions come.
            top: classes an image, >= 1.
            images: whether predictions carry their images; without, a folder of any size takes no more memory.
        """
        for batch in self._batches(pictures):
            stored = [row.stored for row in batch if row.stored is not None]
            shares = iter(self._shares(stored) if stored else ())
            for row in batch:
                if row.stored is None:
                    yield Prediction(row.path, error=row.error)
                    continue
                classes = self._likeliest(next(shares), top)
                yield Prediction(row.path, classes, self._reader.center(row.stored).copy() if images else None)

    def features(self, pictures: Picture | Iterable[Picture], layer: str = "fc7") -> np.ndarray:
        """What a layer hands to the next one: float32 (N, units) of fc6, fc7 and fc8, (N, maps, H, W) of conv1..conv5.

        Tower a's maps and units come first. Activation, normalization and pooling are done, dropout is off.

        Raises:
            ImageError: a picture cannot be used.
            RunError: there is no such layer.
        """
        rows = list(self.feature_rows(pictures, layer, images=False))
        for row in rows:
            if row.values is None:
                raise ImageError(f"{row.path}: {row.error}")
        check_layer(layer)
        return np.stack([row.values for row in rows if row.values is not None]) if rows else np.zeros((0,), np.float32)

    def feature_rows(
        self, pictures: Picture | Iterable[Picture], layer: str, *, images: bool = True
    ) -> Iterator[FeatureRow]:
        """:meth:`features`, batch by batch; a picture that cannot be used has its ``error``."""
        check_layer(layer)
        for batch in self._batches(pictures):
            stored = [row.stored for row in batch if row.stored is not None]
            values = iter(self._values(stored, layer) if stored else ())
            for row in batch:
                if row.stored is None:
                    yield FeatureRow(row.path, error=row.error)
                    continue
                image = self._centers.center(row.stored).copy() if images else None
                yield FeatureRow(row.path, next(values), image)

    def kernels(self) -> np.ndarray:
        """conv1's weights, float32 (kernels, k, k, C), tower a's first: figure 3 of the paper."""
        weight: Tensor = self._net.conv1.weight  # type: ignore[assignment]
        return weight.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()

    def _batches(self, pictures: Picture | Iterable[Picture]) -> Iterator[list[_Read]]:
        waiting: list[_Read] = []
        for number, picture in enumerate(_many(pictures)):
            path = Path(picture) if isinstance(picture, str | Path) else Path(f"picture {number}")
            try:
                waiting.append(_Read(path, self._reader.read(picture), ""))
            except ImageError as error:
                waiting.append(_Read(path, None, str(error)))
            if len(waiting) == self._batch_size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    @torch.no_grad()
    def _shares(self, stored: Sequence[np.ndarray]) -> Tensor:
        """Probabilities of stored images, (N, classes) on the CPU; of ten views their mean (paper section 4.1)."""
        images = self._reader.images(stored)
        views = images if images.dim() == 5 else images[:, None]
        shares = functional.softmax(self._net(views.flatten(0, 1)).float(), dim=1)
        return shares.unflatten(0, (-1, views.shape[1])).mean(1).cpu()

    @torch.no_grad()
    def _values(self, stored: Sequence[np.ndarray], layer: str) -> np.ndarray:
        """A layer's output for stored images."""
        place = {"fc6": "drop6", "fc7": "drop7", "fc8": "fc8"}.get(layer, layer.replace("conv", "post"))
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor | TowerMaps) -> None:
            found.append(join(output).clone())

        hook = getattr(self._net, place).register_forward_hook(keep)
        try:
            self._net(self._centers.images(stored))
        finally:
            hook.remove()
        return found[0].float().cpu().contiguous().numpy()

    def _likeliest(self, shares: Tensor, top: int) -> tuple[ClassShare, ...]:
        """The ``top`` likeliest classes of one image's (classes,) probabilities."""
        values, labels = shares.topk(min(max(1, top), len(self.classes)))
        return tuple(
            ClassShare(label, self.classes[label].name, self.classes[label].title, value)
            for label, value in zip(labels.tolist(), values.tolist(), strict=True)
        )


def load(
    run: str | Path,
    data: str | Path | None = None,
    *,
    device: str = "cpu",
    views: str = "center",
    checkpoint: str = "newest",
) -> TrainedNet:
    """Loads a run's net.

    Args:
        run: run folder.
        data: data set whose preparation applies; None for the one that the run was trained on, which the run keeps.
        device: ``cpu`` or ``cuda:N``, where the net runs.
        views: ``center``, or ``ten`` whose probabilities are averaged (paper section 4.1).
        checkpoint: ``newest``, ``best`` (held-out top-1) or the number of a step.

    Raises:
        TrainerError: no run, no checkpoint, or a data set that does not fit the net.
        PipelineError: there is no complete data set.
    """
    folder = None if data is None else Path(data)
    return TrainedNet(Path(run), folder, device=device, views=views, which=checkpoint)


def check_layer(layer: str) -> None:
    """Refuses a name that is no layer's.

    Raises:
        RunError: it is none.
    """
    if layer not in LAYERS:
        raise RunError(f"layer {layer!r}: expected one of {', '.join(LAYERS)}")


def _many(pictures: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """One picture, or several, as several; an array with four dimensions is several."""
    if isinstance(pictures, np.ndarray):
        return list(pictures) if pictures.ndim == 4 else [pictures]
    if isinstance(pictures, str | bytes | Path) or hasattr(pictures, "getexif"):
        return [typing.cast(Picture, pictures)]
    return pictures


__all__ = ["ClassShare", "FeatureRow", "InputRule", "Picture", "Prediction", "TrainedNet", "load"]
