"""Top-1 and top-5 accuracy of a net on held-out images."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.loader.batch import Batch
from pipeline.loader.batches import EvaluationLoader
from pipeline.manifest import read_manifest
from trainer.config import Config
from trainer.errors import CheckpointError, RunError
from trainer.model.alexnet import AlexNet
from trainer.parallel.crossing import make_net
from trainer.parallel.mesh import Mesh
from trainer.parallel.status import sum_over_replicas
from trainer.training.checkpoint import check_holds, choose, load_towers
from trainer.training.fit import TOP5_CLASSES, check_fits
from trainer.training.kept_data import compare_data
from trainer.training.resume import check_edited
from trainer.training.run_folder import read_run_config


class StoppedEvaluation(Exception):
    """An evaluation was given up because a process was asked to stop; resumed, the run makes it first."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts and rates over a split.

    Attributes:
        num_samples: images.
        num_correct_top1: images whose likeliest class is the label.
        num_correct_top5: images whose label is among the five likeliest; None with fewer than six classes, where that
            says nothing.
        loss: mean cross entropy, nats.
        views: ``center`` or ``ten``.
    """

    num_samples: int
    num_correct_top1: int
    num_correct_top5: int | None
    loss: float
    views: str

    @property
    def top1(self) -> float:
        """Share of images whose likeliest class is the label, 0..1."""
        return self.num_correct_top1 / max(1, self.num_samples)

    @property
    def top5(self) -> float | None:
        """Share of images whose label is among the five likeliest, 0..1; None with fewer than six classes."""
        return None if self.num_correct_top5 is None else self.num_correct_top5 / max(1, self.num_samples)

    def to_dict(self) -> dict[str, Any]:
        """Counts and rates, for JSON."""
        names = ("num_samples", "num_correct_top1", "num_correct_top5", "loss", "views")
        return {"top1": self.top1, "top5": self.top5} | {name: getattr(self, name) for name in names}

    def sentence(self) -> str:
        """Counts and rates, for people."""
        total = self.num_samples
        top5 = "" if self.top5 is None else f"top-5 {self.top5:.4f} ({self.num_correct_top5} of {total}), "
        return f"top-1 {self.top1:.4f} ({self.num_correct_top1} of {total}), {top5}{self.views}, loss {self.loss:.4f}"


@dataclasses.dataclass(frozen=True)
class Evaluation(Counts):
    """Counts over a split, and every prediction.

    Attributes:
        keys: sample keys, in the order of the data set.
        labels: (num_samples,) int64.
        predicted: (num_samples,) int64, the likeliest class.
        confidence: (num_samples,) float32, its probability.
        in_top5: (num_samples,) bool, whether the label is among the five likeliest.
    """

    keys: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    in_top5: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Scores:
    """What is kept of a batch: of each image some bytes, however many classes there are. All (N,), on the CPU."""

    keys: tuple[str, ...]
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    in_top5: Tensor
    log_likelihood: Tensor  # of the label
    num_classes: int


class _Columns:
    """What is kept of all images, in one array each: small pieces of every batch would leave holes in the heap."""

    def __init__(self) -> None:
        self._num = 0
        self._arrays: dict[str, np.ndarray] = {
            "labels": np.empty(0, np.int64),
            "predicted": np.empty(0, np.int64),
            "confidence": np.empty(0, np.float32),
            "in_top5": np.empty(0, bool),
        }

    def add(self, scores: _Scores) -> None:
        """Takes a batch."""
        end = self._num + len(scores.labels)
        for name, array in self._arrays.items():
            if end > len(array):
                array = self._arrays[name] = np.concatenate([array, np.empty(max(end, 4096), array.dtype)])
            array[self._num : end] = getattr(scores, name).numpy()
        self._num = end

    def arrays(self) -> dict[str, Any]:
        """Those of :class:`Evaluation`."""
        return {name: array[: self._num].copy() for name, array in self._arrays.items()}


class _Tally:
    """Adds up batches."""

    def __init__(self) -> None:
        self.words = [0, 0, 0]  # images, right ones, those with the label among the five likeliest
        self.num_classes, self.log_likelihood = 0, 0.0

    def add(self, scores: _Scores) -> None:
        """Takes a batch."""
        right = scores.predicted == scores.labels
        found = (len(scores.labels), int(right.sum()), int(scores.in_top5.sum()))
        self.words = [before + more for before, more in zip(self.words, found, strict=True)]
        self.log_likelihood += float(scores.log_likelihood.double().sum())
        self.num_classes = scores.num_classes

    def gather(self, mesh: Mesh | None) -> None:
        """Adds what the other replicas have counted; all processes that hold this tower must call it."""
        if mesh and mesh.replicas:
            *self.words, self.num_classes, self.log_likelihood = sum_over_replicas(
                mesh.replicas, [*self.words, self.num_classes], self.log_likelihood
            )

    def fields(self, views: str) -> dict[str, Any]:
        """Those of :class:`Counts`."""
        samples, top1, top5 = self.words
        return {
            "num_samples": samples,
            "num_correct_top1": top1,
            "num_correct_top5": top5 if self.num_classes >= TOP5_CLASSES else None,
            "loss": -self.log_likelihood / max(1, samples),
            "views": views,
        }


def evaluate_net(net: AlexNet, batches: Iterable[Batch], views: str = "center") -> Evaluation | None:
    """Runs every image through the net. Both towers must call it, where they are in two processes.

    Args:
        net: the net, or this process's tower.
        batches: batches of an :class:`pipeline.loader.batches.EvaluationLoader`.
        views: ``center``: images (N, C, S, S). ``ten``: (N, 10, C, S, S), softmax outputs averaged (paper section 4.1).

    Returns:
        The evaluation where tower a is held, None elsewhere.
    """
    tally, kept, keys = _Tally(), _Columns(), list[str]()
    for scores in _score_batches(net, batches, views):
        tally.add(scores)
        kept.add(scores)
        keys += scores.keys
    if "a" not in net.towers:
        return None
    return Evaluation(**tally.fields(views), keys=tuple(keys), **kept.arrays())


def count_net(net: AlexNet, batches: Iterable[Batch], mesh: Mesh | None = None) -> Counts | None:
    """As :func:`evaluate_net` of the center crop, without the predictions, over all replicas together.

    Args:
        net: the net, or this process's tower.
        batches: this replica's share of the split.
        mesh: the other processes; all of them must call it.
    """
    tally = _Tally()
    for scores in _score_batches(net, batches, "center"):
        tally.add(scores)
    if "a" not in net.towers:
        return None
    tally.gather(mesh)
    return Counts(**tally.fields("center"))


@torch.no_grad()
def _score_batches(net: AlexNet, batches: Iterable[Batch], views: str) -> Iterator[_Scores]:
    """Batch after batch, nothing where tower a is not held; the net is left in the mode that it was in."""
    was_training = net.training
    net.eval()
    for batch in batches:
        output = net(batch.images.flatten(0, 1) if views == "ten" else batch.images)
        if "a" in net.towers:
            shares = functional.softmax(output.float(), dim=1)
            shares = shares.unflatten(0, (-1, 10)).mean(1) if views == "ten" else shares
            yield _score(shares, batch)
    net.train(was_training)


def _score(probabilities: Tensor, batch: Batch) -> _Scores:
    """What is kept of a batch; probabilities (N, classes). Copies: a view would keep all that it is a part of."""
    labels = batch.labels[:, None]
    ranked = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
    return _Scores(
        keys=batch.keys,
        labels=batch.labels.cpu(),
        predicted=ranked.indices[:, 0].clone().cpu(),
        confidence=ranked.values[:, 0].clone().cpu(),
        in_top5=(ranked.indices == labels).any(1).cpu(),
        log_likelihood=probabilities.gather(1, labels)[:, 0].clamp_min(1e-30).log().cpu(),
        num_classes=probabilities.shape[1],
    )


@dataclasses.dataclass(frozen=True)
class LoadedNet:
    """A checkpoint's net, both towers in this process.

    Attributes:
        net: ready for testing.
        config: the run's recipe.
        step: finished updates.
    """

    net: AlexNet
    config: Config
    step: int


def load_network(run: Path, device: str = "cpu", *, which: str = "newest") -> LoadedNet:
    """Loads a checkpoint's net.

    Args:
        run: run folder.
        device: where the net goes.
        which: see :func:`trainer.training.checkpoint.choose`.

    Raises:
        RunError: no run, or no checkpoint in it, or its recipe was edited.
        CheckpointError: there is none such, or it is damaged.
    """
    config = read_run_config(run)
    while True:
        found = choose(run, which)
        if found is None:
            raise RunError(f"{run} has no checkpoint yet: train it first")
        check_edited(run, config, found)
        check_holds(found, config)
        net = make_net(config, None, device=device)
        try:
            load_towers(found.folder, net)
        except CheckpointError:
            if os.path.lexists(found.folder):
                raise
            continue  # a training that goes on has removed it meanwhile
        return LoadedNet(net.eval(), config, found.record.step)


def evaluate_run(
    run: Path,
    data: Path,
    *,
    split: str | None = None,
    views: str = "center",
    device: str = "cpu",
    which: str = "newest",
) -> Evaluation:
    """Evaluates a run's checkpoint on a split (by default the one its recipe holds out)."""
    loaded = load_network(run, device, which=which)
    net, config = loaded.net, loaded.config
    chosen = split or config.train.evaluate_split
    manifest = read_manifest(data)
    check_fits(config, manifest, data, splits=(chosen,))
    loader = EvaluationLoader(
        data,
        config.data,
        batch_size=config.train.batch_size,
        split=chosen,
        views=views,
        device=device,
        statistics=compare_data(run, data, manifest),
    )
    result = evaluate_net(net, loader, views)
    assert result is not None
    return result
