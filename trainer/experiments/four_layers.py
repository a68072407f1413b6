"""``python -m trainer.experiments.four_layers``: one run of figure 1, the paper's net of four layers.

The paper says no more of that net than its number of layers, and that "no regularization of any kind was employed".
Here it has three convolutions of 32, 32 and 64 maps of 5 px, each followed by max pooling (3 px, stride 2) and the
activation, and one fully connected layer, as the authors' small nets for CIFAR-10 had. It is no AlexNet, so the run is
made by a loop of its own, with the project's loader and update rule. Its folder has ``config.toml``,
``metrics.jsonl`` with the training error ten times an epoch, ``result.json``, and ``state.pt``, from which the same
command goes on, bit for bit.
"""

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import PipelineError
from pipeline.loader.batches import TrainingLoader
from pipeline.loader.staging import stage
from pipeline.manifest import write_atomic
from trainer import stopping
from trainer.config import Config, ModelConfig, load_config, to_toml
from trainer.errors import DivergedError, RunError, TrainerError
from trainer.experiments.catalog import KERNEL_PX, MAPS, POOL_PX, POOL_STRIDE, last_side
from trainer.experiments.measures import first_crops
from trainer.model.layers import stable_seed
from trainer.training.optimizer import PaperSGD
from trainer.training.rows import NAME
from trainer.training.run_folder import CONFIG_NAME, Result, read_result, write_result
from trainer.training.run_lock import hold_run
from twotower.terminal import print_error

LOOKS_AN_EPOCH = 10  # at the training error
MOST_SEEN, MOST_BYTES = 5000, 1 << 28  # training images that it is the error of; they are held in memory
STATE_NAME = "state.pt"


class FourLayerNet(nn.Module):
    """Three convolutions and a fully connected layer.

    Args:
        config: image_px, in_channels, classes and activation are used; the rest is AlexNet's.
        seed: of the initial weights: normal, (1 / inputs)^0.5, the same for both activations; biases zero.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.activation = {"relu": functional.relu_, "tanh": torch.tanh}[config.activation]
        first, second, third = MAPS
        self.conv1 = nn.Conv2d(config.in_channels, first, KERNEL_PX, padding=KERNEL_PX // 2)
        self.conv2 = nn.Conv2d(first, second, KERNEL_PX, padding=KERNEL_PX // 2)
        self.conv3 = nn.Conv2d(second, third, KERNEL_PX, padding=KERNEL_PX // 2)
        self.fc4 = nn.Linear(third * last_side(config.image_px) ** 2, config.classes)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                generator = torch.Generator().manual_seed(stable_seed(seed, "init", name))
                std = (1 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.0
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, image_px, image_px) float32 to logits (N, classes)."""
        for conv in (self.conv1, self.conv2, self.conv3):  # pooling before the activation gives the same, for less
            x = self.activation(functional.max_pool2d(conv(x), POOL_PX, POOL_STRIDE, ceil_mode=True))
        return self.fc4(x.flatten(1))


def step_seconds(config: Config, device: str, steps: int = 12) -> float:
    """Measures a step on made-up images, s."""
    work = _Work(config, device)
    side, batch = config.model.image_px, config.train.batch_size
    images = torch.randn(batch, config.model.in_channels, side, side, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        work.update(images, labels)
        times.append(time.perf_counter() - begin)
    return sorted(times)[steps // 2]


class _Work:
    """Net and optimizer."""

    def __init__(self, config: Config, device: str) -> None:
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.net = FourLayerNet(config.model, config.train.seed).to(device)
        self.optimizer = PaperSGD(self.net.named_parameters(), config.optimizer)

    def update(self, images: Tensor, labels: Tensor) -> float:
        """One step; the mean loss before it, nats."""
        self.net.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(self.net(images), labels)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """Weights and velocities."""
        velocities = {name: self.optimizer.velocity(p) for name, p in self.net.named_parameters()}
        return {"weights": self.net.state_dict(), "velocities": velocities}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self.net.load_state_dict(state["weights"])
        for name, parameter in self.net.named_parameters():
            self.optimizer.velocity(parameter).copy_(state["velocities"][name])


class Run:
    """A run in its folder.

    Args:
        config: the recipe.
        data: data set folder.
        run: run folder.
        device: ``cpu`` or ``cuda:N``.
    """

    def __init__(self, config: Config, data: Path, run: Path, device: str) -> None:
        self.config, self.run, self.device = config, run, device
        self.work = _Work(config, device)
        state = self._read_state()
        self.step: int = state.get("step", 0)
        self.rows: list[dict[str, Any]] = state.get("rows", [])
        self.elapsed_s: float = state.get("elapsed_s", 0.0)
        if state:
            self.work.load(state)
        train = config.train
        self.loader = TrainingLoader(
            data, config.data, batch_size=train.batch_size, seed=train.seed, device=device, state=state.get("loader")
        )
        self.seen = self._seen(data)
        self.total = train.epochs * self.loader.steps_per_epoch
        self.begin = time.perf_counter()

    def _read_state(self) -> dict[str, Any]:
        path = self.run / STATE_NAME
        if not path.exists():
            return {}
        try:
            return dict(torch.load(path, map_location=self.device, weights_only=True))
        except Exception as error:
            why = f"{path} is damaged ({type(error).__name__})"
            raise RunError(f"{why}: remove {self.run}, and the run begins anew") from None

    def _seen(self, data: Path) -> list[tuple[Tensor, Tensor]]:
        """The training images that the error is measured on, the same at every look: the first of the split."""
        model, size = self.config.model, self.config.train.batch_size
        most = max(1, min(MOST_SEEN, MOST_BYTES // (4 * model.in_channels * model.image_px**2)))
        images, labels = first_crops(data, self.config, most, self.device)
        return list(zip(images.split(size), labels.split(size), strict=True))

    def train(self, stop: stopping.StopRequest) -> bool:
        """Steps and looks; False where a stop came first.

        Raises:
            DivergedError: the loss is not finite.
        """
        every = max(1, self.loader.steps_per_epoch // LOOKS_AN_EPOCH)
        try:
            while self.step < self.total and not stop.name:
                batch = self.loader.next()
                loss = self.work.update(batch.images, batch.labels)
                if not math.isfinite(loss):
                    raise DivergedError(f"step {self.step}: the loss is {loss}: lower optimizer.learning_rate")
                self.step += 1
                if self.step % every == 0 or self.step == self.total:
                    self._look()
                if self.step % self.loader.steps_per_epoch == 0 and self.step < self.total:
                    self._save()
            self._save()
        finally:
            self.loader.close()
        return self.step == self.total

    @torch.no_grad()
    def _look(self) -> None:
        """The training error now, as a row of the run."""
        right = total = 0
        losses = 0.0
        for images, labels in self.seen:
            logits = self.work.net(images)
            losses += float(functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            total += len(labels)
        row = {"kind": "evaluation", "step": self.step, "epoch": self.step / self.loader.steps_per_epoch}
        row |= {"split": "train", "views": "center", "top1": right / total, "top5": None, "loss": losses / total}
        self.rows.append(row | {"num_samples": total, "elapsed_s": self._elapsed_s()})
        write_atomic(self.run / NAME, "".join(json.dumps(each) + "\n" for each in self.rows).encode())

    def _save(self) -> None:
        state = {"step": self.step, "rows": self.rows, "elapsed_s": self._elapsed_s(), "loader": self.loader.state()}
        file = io.BytesIO()
        torch.save(state | self.work.state(), file)
        write_atomic(self.run / STATE_NAME, file.getvalue())

    def _elapsed_s(self) -> float:
        return self.elapsed_s + time.perf_counter() - self.begin

    def result(self, reason: str) -> Result:
        """The run so far."""
        last, batch = self.rows[-1] if self.rows else {}, self.config.train.batch_size
        return Result(
            exit_reason=reason,
            reason="",
            step=self.step,
            epoch=self.step / self.loader.steps_per_epoch,
            top1=last.get("top1"),
            top5=None,
            num_samples=last.get("num_samples", 0),
            elapsed_s=self._elapsed_s(),
            images_per_s=self.step * batch / self._elapsed_s(),
            processes=1,
            batch_size=batch,
            ledger=[],
        )


def main(words: Sequence[str] | None = None) -> int:
    """Makes a run or goes on with it; 0 finished, 3 stopped and saved, 2 refused."""
    parser = argparse.ArgumentParser(prog="python -m trainer.experiments.four_layers")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--device")
    arguments = parser.parse_args(words)
    try:
        return _make(arguments)
    except (TrainerError, PipelineError, OSError) as error:
        print_error(error)
        return 2


def _make(arguments: argparse.Namespace) -> int:
    from trainer.parallel.launch import choose_device

    config = load_config(arguments.config, arguments.set)
    stop = stopping.StopRequest()
    with stopping.handled_by(stop.note), hold_run(arguments.run):
        if read_result(arguments.run).get("exit_reason") == "finished":
            return 0
        run = Run(config, stage(arguments.data), arguments.run, choose_device(arguments.device))
        write_atomic(arguments.run / CONFIG_NAME, to_toml(config).encode())
        finished = run.train(stop)
        write_result(arguments.run, run.result("finished" if finished else "stopped"))
        return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
