"""What is measured of a finished run besides its accuracy: figures for its row, and arrays for the page."""

import dataclasses
import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.manifest import Manifest, read_manifest, write_atomic
from trainer.config import Config
from trainer.errors import RunError
from trainer.experiments.catalog import LEVELS, epochs_key
from trainer.experiments.folder import RunTask
from trainer.experiments.variants import Kind
from trainer.report.run_data import read_run

if TYPE_CHECKING:
    from torch import Tensor

DEALS, DEAL_SEED = 2000, 1  # of the kernels into two random halves
NUM_ASKED, NUM_SHOWN = 500, 8  # test images whose neighbors are looked for, and that the page shows
MOST_AMONG = 5000  # training images to find them in
NUM_NEAREST = 6  # as in the paper's figure 4
TOP = 5


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a run.

    Attributes:
        figures: for its row; None where one has no value.
        arrays: for the page and the average of several runs; empty for none.
    """

    figures: dict[str, float | None]
    arrays: dict[str, NDArray[Any]] = dataclasses.field(default_factory=dict)


def measure(kind: Kind, task: RunTask, data: Path, device: str) -> Measured:
    """Measures a finished run.

    Raises:
        TrainerError, PipelineError: it cannot be measured; says why.
    """
    makers: dict[str, Callable[[RunTask, Path, str], Measured]] = {
        "color": _color,
        "epochs": _epochs,
        "neighbors": _neighbors,
        "views": _views,
    }
    return Measured({}) if kind == "none" else makers[kind](task, data, device)


def save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Writes the arrays of a run; nothing where there are none.

    Raises:
        RunError: they cannot be written.
    """
    if not arrays:
        return
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    try:
        write_atomic(path, file.getvalue())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def load(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a run; {} where there are none, or they are damaged."""
    try:
        with np.load(path) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}


def color_energy(weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Energy of first-layer kernels and its color part, (maps, 2) float64: all, and without each kernel's gray part.

    Args:
        weight: shape (maps, 3, k, k).
    """
    found = weight.astype(np.float64)
    gray = found.mean(axis=1, keepdims=True)
    return np.stack([np.square(found).sum(axis=(1, 2, 3)), np.square(found - gray).sum(axis=(1, 2, 3))], axis=1)


def color_share(energy: NDArray[np.float64]) -> float:
    """The share of color in the energy of some kernels, 0..1; kernels count by their energy, so idle ones do not."""
    total, color = energy.sum(axis=0)
    return float(color / total) if total else 0.0


def gap_by_chance(energy: NDArray[np.float64], gap: float) -> float:
    """The share of random halves of all kernels whose color differs by ``gap`` or more, the two towers counted in."""
    generator, half = np.random.default_rng(DEAL_SEED), len(energy) // 2
    count = 0
    for _ in range(DEALS):
        order = generator.permutation(len(energy))
        count += abs(color_share(energy[order[:half]]) - color_share(energy[order[half:]])) >= gap
    return (count + 1) / (DEALS + 1)


def _color(task: RunTask, _data: Path, _device: str) -> Measured:
    """Color of conv1's kernels, tower by tower."""
    kernels = read_run(task.run).kernels
    if set(kernels) != {"a", "b"}:
        raise RunError(f"{task.run}: expected kernels of two towers in its checkpoint, found {sorted(kernels)}")
    energy = {tower: color_energy(weight) for tower, weight in kernels.items()}
    shares = {tower: color_share(rows) for tower, rows in energy.items()}
    gap = abs(shares["a"] - shares["b"])
    figures: dict[str, float | None] = {
        "color_a": shares["a"],
        "color_b": shares["b"],
        "color_gap": gap,
        "gap_by_chance": gap_by_chance(np.concatenate([energy["a"], energy["b"]]), gap),
    }
    return Measured(figures, {f"kernels_{tower}": weight for tower, weight in kernels.items()})


def _epochs(task: RunTask, _data: Path, _device: str) -> Measured:
    """Epochs until the training error first falls to some levels."""
    evaluations = read_run(task.run).evaluations
    curve = [(float(row["epoch"]), 1 - float(row["top1"])) for row in evaluations if row.get("split") == "train"]
    return Measured({epochs_key(level): epochs_to(curve, level) for level in LEVELS})


def epochs_to(curve: list[tuple[float, float]], level: float) -> float | None:
    """The epoch at which a falling curve first meets a level, linear between evaluations.

    Args:
        curve: (epoch, error) of every evaluation, ascending.
        level: of the error.

    Returns:
        None where it is never met, or already at the first evaluation: before it nothing was measured.
    """
    for (before, high), (after, low) in itertools.pairwise(curve):
        if high > level >= low:
            return before + (after - before) * (high - level) / (high - low)
        if high <= level:
            return None
    return None


def stored_images(data: Path, split: str, limit: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The first images of a split as they are stored, uint8 (H, W, C), with their labels."""
    manifest = read_manifest(data)
    count = 0
    for shard in manifest.splits[split].shards:
        held: dict[str, bytes] = {}
        with tarfile.open(data / shard.name) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                if file is None or extension not in (manifest.image.extension, "cls"):
                    continue
                held[f"{key}.{extension}"] = file.read()
                image, label = f"{key}.{manifest.image.extension}", f"{key}.cls"
                if image in held and label in held:
                    yield _decode(held.pop(image), manifest), int(held.pop(label))
                    count += 1
                    if count == limit:
                        return


def first_crops(data: Path, config: Config, count: int, device: str = "cpu") -> "tuple[Tensor, Tensor]":
    """The first training images, fewer where there are fewer: center crops (N, C, S, S) float32, labels (N,) int64."""
    import torch

    from pipeline.loader.batches import EvaluationLoader

    images, labels = [], []
    size = config.train.batch_size
    for batch in EvaluationLoader(data, config.data, batch_size=size, split="train", device=device):
        images.append(batch.images)
        labels.append(batch.labels)
        if sum(map(len, labels)) >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def _decode(content: bytes, manifest: Manifest) -> NDArray[np.uint8]:
    image = manifest.image
    if image.encoding == "raw":
        assert image.height_px and image.width_px
        return np.frombuffer(content, np.uint8).reshape(image.height_px, image.width_px, image.channels)
    with Image.open(io.BytesIO(content)) as opened:
        pixels = np.asarray(opened.convert("RGB" if image.channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], image.channels)


def _neighbors(task: RunTask, data: Path, device: str) -> Measured:
    """Nearest training images by fc7 and by pixels, and the likeliest classes, of the first test images."""
    from trainer.inference import load as load_net

    net = load_net(task.run, data, device=device)
    asked, asked_labels = _split(data, task.config.train.evaluate_split, NUM_ASKED)
    among, among_labels = _split(data, "train", MOST_AMONG)
    by_net = _nearest(net.features(asked), net.features(among))
    crops = [[net.crop(image) for image in images] for images in (asked, among)]
    by_pixels = _nearest(*(np.stack(found).reshape(len(found), -1).astype(np.float32) for found in crops))
    shares = {
        name: float((among_labels[found] == asked_labels[:, None]).mean())
        for name, found in (("same_class_fc7", by_net), ("same_class_pixels", by_pixels))
    }
    predictions = net.classify(asked[:NUM_SHOWN], top=TOP)
    classes = [[(each.title, each.probability) for each in prediction.classes] for prediction in predictions]
    titles = [net.classes[label].title for label in asked_labels[:NUM_SHOWN].tolist()]
    arrays = {
        "asked": np.stack(crops[0][:NUM_SHOWN]),
        "nearest": np.stack([[crops[1][place] for place in row] for row in by_net[:NUM_SHOWN].tolist()]),
        "words": np.array(json.dumps({"titles": titles, "classes": classes})),
    }
    gain = shares["same_class_fc7"] - shares["same_class_pixels"]
    return Measured({**shares, "same_class_gain": gain}, arrays)


def _split(data: Path, split: str, limit: int) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    found = list(stored_images(data, split, limit))
    return [image for image, _ in found], np.array([label for _, label in found], dtype=np.int64)


def _nearest(asked: NDArray[np.float32], among: NDArray[np.float32]) -> NDArray[np.int64]:
    """Places of the nearest rows by Euclidean distance, nearest first, (len(asked), 6)."""
    first, second = asked.astype(np.float64), among.astype(np.float64)
    squares = np.square(first).sum(1)[:, None] - 2 * first @ second.T + np.square(second).sum(1)
    return np.argsort(squares, axis=1, kind="stable")[:, :NUM_NEAREST]


def _views(task: RunTask, data: Path, device: str) -> Measured:
    """Errors with one view and with ten, and the probabilities, which several runs' are averaged with."""
    figures: dict[str, float | None] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for views, name in (("center", "center"), ("ten", "ten")):
        shares, labels = _probabilities(task, data, device, views)
        arrays |= {name: shares, "labels": labels}
        for count, error in errors_of(shares, labels).items():
            figures[f"{count}_{name}"] = error
    for count in ("top1", "top5"):
        ten, center = figures[f"{count}_ten"], figures[f"{count}_center"]
        figures[f"{count}_views_gain"] = None if ten is None or center is None else ten - center
    return Measured(figures, arrays)


def errors_of(shares: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> dict[str, float | None]:
    """Top-1 and top-5 error, 0..1, of probabilities (N, classes); no top-5 with fewer than six classes."""
    order = np.argsort(-shares, axis=1, kind="stable")[:, :TOP]
    hits = order == labels[:, None]
    top5 = float(1 - hits.any(axis=1).mean()) if shares.shape[1] > TOP else None
    return {"top1": float(1 - hits[:, 0].mean()), "top5": top5}


def _probabilities(task: RunTask, data: Path, device: str, views: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What the run's net says of the held-out split: probabilities (N, classes), of ten views their mean; labels."""
    import torch

    from pipeline.loader.batches import EvaluationLoader
    from trainer.training.evaluate import load_network
    from trainer.training.kept_data import compare_data

    loaded = load_network(task.run, device)
    config, found, labels = loaded.config, [], []
    loader = EvaluationLoader(
        data,
        config.data,
        batch_size=config.train.batch_size,
        split=config.train.evaluate_split,
        views=views,
        device=device,
        statistics=compare_data(task.run, data, read_manifest(data)),
    )
    with torch.no_grad():
        for batch in loader:
            images = batch.images.flatten(0, 1) if views == "ten" else batch.images
            shares = loaded.net(images).float().softmax(dim=1)
            found.append((shares.unflatten(0, (-1, 10)).mean(1) if views == "ten" else shares).cpu())
            labels.append(batch.labels.cpu())
    return torch.cat(found).numpy(), torch.cat(labels).numpy()
