"""Top-1 and top-5 accuracy of a net on held-out images."""

import dataclasses
from collections.abc import Iterable
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
from trainer.errors import RunError
from trainer.model.alexnet import AlexNet
from trainer.parallel.crossing import make_net
from trainer.training.checkpoint import check_holds, choose, load_towers
from trainer.training.fit import TOP5_CLASSES, check_fits
from trainer.training.kept_data import compare_data
from trainer.training.resume import check_edited
from trainer.training.run_folder import read_run_config


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Counts and rates over a split, and every prediction.

    Attributes:
        num_samples: images.
        num_correct_top1: images whose likeliest class is the label.
        num_correct_top5: images whose label is among the five likeliest; None with fewer than six classes, where that
            says nothing.
        loss: mean cross entropy, nats.
        views: ``center`` or ``ten``.
        keys: sample keys, in the order of the data set.
        labels: (num_samples,) int64.
        predicted: (num_samples,) int64, the likeliest class.
        confidence: (num_samples,) float32, its probability.
        in_top5: (num_samples,) bool, whether the label is among the five likeliest.
    """

    num_samples: int
    num_correct_top1: int
    num_correct_top5: int | None
    loss: float
    views: str
    keys: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    in_top5: np.ndarray

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


@torch.no_grad()
def evaluate_net(net: AlexNet, batches: Iterable[Batch], views: str = "center") -> Evaluation | None:
    """Runs every image through the net. Both towers must call it, where they are in two processes.

    Args:
        net: the net, or this process's tower.
        batches: batches of an :class:`pipeline.loader.batches.EvaluationLoader`.
        views: ``center``: images (N, C, S, S). ``ten``: (N, 10, C, S, S), softmax outputs averaged (paper section 4.1).

    Returns:
        The evaluation where tower a is held, None elsewhere.
    """
    keys: list[str] = []
    labels, probabilities = [], []
    was_training = net.training
    net.eval()
    for batch in batches:
        output = net(batch.images.flatten(0, 1) if views == "ten" else batch.images)
        if "a" in net.towers:
            shares = functional.softmax(output.float(), dim=1)
            probabilities.append((shares.unflatten(0, (-1, 10)).mean(1) if views == "ten" else shares).cpu())
            labels.append(batch.labels.cpu())
            keys += batch.keys
    net.train(was_training)
    return _summarize(torch.cat(probabilities), torch.cat(labels), keys, views) if "a" in net.towers else None


def _summarize(probabilities: Tensor, labels: Tensor, keys: list[str], views: str) -> Evaluation:
    """Counts; probabilities (N, classes), labels (N,)."""
    ranked = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
    hits = ranked.indices == labels[:, None]
    likelihood = probabilities.gather(1, labels[:, None]).clamp_min(1e-30)
    return Evaluation(
        num_samples=len(labels),
        num_correct_top1=int(hits[:, 0].sum()),
        num_correct_top5=int(hits.any(1).sum()) if probabilities.shape[1] >= TOP5_CLASSES else None,
        loss=float(-likelihood.log().mean()),
        views=views,
        keys=tuple(keys),
        labels=labels.numpy(),
        predicted=ranked.indices[:, 0].numpy(),
        confidence=ranked.values[:, 0].numpy(),
        in_top5=hits.any(1).numpy(),
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
    found = choose(run, which)
    if found is None:
        raise RunError(f"{run} has no checkpoint yet: train it first")
    check_edited(run, config, found)
    check_holds(found, config)
    net = make_net(config, None, device=device)
    load_towers(found.folder, net)
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
