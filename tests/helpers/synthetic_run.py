"""A run folder for the report's tests: written by the trainer's own writers, with plausible numbers."""

import json
from pathlib import Path

import numpy as np

from trainer.config import Config, load_config, to_toml
from trainer.model.alexnet import AlexNet
from trainer.planning.describe import count_crossings
from trainer.report.report import ImageRow, ImageSet
from trainer.training import checkpoint
from trainer.training.metrics import MetricsLog
from trainer.training.optimizer import PaperSGD
from trainer.training.run_folder import Result, write_result

ROOT = Path(__file__).resolve().parents[2]


def digits_config() -> Config:
    return load_config(ROOT / "configs" / "digits.toml", ["train.batch_size=64"])


def step_row(step: int, generator: np.random.Generator) -> dict:
    return {
        "kind": "step",
        "step": step,
        "epoch": (step - 1) // 22,
        "loss": 2.3 * float(np.exp(-step / 90) + 0.01) * float(generator.uniform(0.7, 1.4)),
        "learning_rate": 0.02 if step <= 308 else 0.004,
        "images_per_s": float(generator.normal(900, 40)),
        "data_wait_share": float(generator.uniform(0.005, 0.03)),
        "gradient_norm": {"a": float(generator.uniform(0.5, 2)), "b": float(generator.uniform(0.3, 1.5))},
    }


def ledger_of(config: Config) -> list[dict]:
    batch, rows = config.train.batch_size, []
    for crossing in count_crossings(config.model):
        for phase, forwards in (("forward", True), ("backward", False)):
            for way, count in (("a->b", crossing.bytes_a_to_b), ("b->a", crossing.bytes_b_to_a)):
                if count:
                    direction = way if forwards else way[3] + "->" + way[0]
                    row = {"kind": "crossing", "name": crossing.layer, "phase": phase, "direction": direction}
                    rows.append(row | {"calls": 1, "bytes": count * batch})
    control = {"kind": "control", "name": "flags and fingerprint", "phase": "step", "calls": 1, "bytes": 24}
    return [*rows, control | {"direction": "a->b"}, control | {"direction": "b->a"}]


def make_run(folder: Path, config: Config, *, steps: int = 440, ended: bool = True) -> Path:
    """A run folder as a run of two processes leaves it; with ``ended`` false, as one leaves it that was killed."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config))
    environment = {"command": "python -m trainer train", "commit": "0123456789ab", "processor": "A CPU", "cores": 2}
    (folder / "environment.json").write_text(json.dumps(environment | {"torch": "2.15.0", "gpus": []}))
    generator = np.random.default_rng(0)
    log = MetricsLog(folder, config, 0)
    for step in range(1, steps + 1):
        log.write(step_row(step, generator))
        if step % 44 == 0:
            top1 = 1 - float(np.exp(-step / 100)) - 0.02
            row = {"kind": "evaluation", "step": step, "epoch": step / 22, "split": "val", "views": "center"}
            log.write(row | {"top1": top1, "top5": 0.995, "loss": 0.1 + 2 * (1 - top1), "num_samples": 360})
    log.close("finished")
    if not ended:
        return folder
    net = AlexNet(config.model, seed=1)
    checkpoint.save_towers(
        checkpoint.unfinished(folder, steps), net, PaperSGD(net.named_parameters(), config.optimizer)
    )
    checkpoint.commit(folder, steps, config=to_toml(config), loader={}, towers=net.towers)
    ending = Result(
        exit_reason="finished",
        reason="",
        step=steps,
        epoch=steps / 22,
        top1=352 / 360,
        top5=359 / 360,
        num_samples=360,
        elapsed_s=93.0,
        images_per_s=897.4,
        processes=2,
        batch_size=config.train.batch_size,
        ledger=ledger_of(config),
    )
    write_result(folder, ending)
    return folder


def some_images() -> ImageSet:
    generator = np.random.default_rng(3)
    images = generator.integers(0, 255, (6, 28, 28, 1), dtype=np.uint8)
    first = [ImageRow(image, str(i), str(i), 0.99) for i, image in enumerate(images[:5])]
    wrong = ImageRow(images[5], "3", "8", 0.731)
    confusion = np.diag(np.full(10, 36))
    confusion[3, 8], confusion[3, 3] = 1, 35
    names = [str(i) for i in range(10)]
    return ImageSet(
        [*first, wrong], [wrong], num_wrong=1, num_samples=360, num_in_split=360, confusion=confusion, classes=names
    )
