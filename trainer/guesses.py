"""What users of other trainers type, and what it is here: ``--epochs 3`` is ``--set train.epochs=3``."""

import dataclasses
import typing
from collections.abc import Iterator

from twotower.command_line import Parser, nearest
from twotower.fields import DERIVED

# Where the recipe's field has another name.
FIELDS = {
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "bs": "train.batch_size",
    "batch": "train.batch_size",
    "epoch": "train.epochs",
    "num-epochs": "train.epochs",
    "max-epochs": "train.epochs",
    "grad-accum": "train.accumulate",
    "gradient-accumulation-steps": "train.accumulate",
    "num-classes": "model.classes",
    "image-size": "model.image_px",
    "img-size": "model.image_px",
    "crop-size": "model.image_px",
    "crop-px": "model.image_px",
    "num-workers": "data.threads",
    "workers": "data.threads",
    "lr-schedule": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "warmup": "optimizer.warmup_epochs",
    "dtype": "train.precision",
    "mixed-precision": "train.precision",
    "save-every": "train.checkpoint_every_epochs",
    "keep": "train.keep_checkpoints",
}
PRECISION = ("amp", "bf16", "half")  # flags elsewhere
# Where an option does it; {} is the value that was typed.
OPTIONS = {
    "--run {}": ("output", "out", "output-dir", "out-dir", "save-dir", "log-dir", "logdir", "work-dir", "name", "exp"),
    "--data {}": ("input", "dataset", "data-dir", "data-path", "data-root", "train-dir", "root"),
    "--html {}": ("output", "out", "save"),
    "--config configs/paper.toml, a recipe": ("model", "arch", "net", "recipe"),
    "--processes 2, one process per tower and GPU": ("gpus", "num-gpus", "n-gpus", "nproc", "nproc-per-node", "ddp"),
    "--device cuda:0": ("gpu", "cuda"),
    "--device cpu": ("cpu", "no-cuda"),
    "--resume auto": ("resume-from", "ckpt", "checkpoint", "load", "continue"),
    "--init-from FILE|RUN": ("pretrained", "weights", "finetune", "fine-tune", "init-weights"),
    "--overwrite": ("force", "exist-ok"),
}


def recipe_fields() -> dict[str, str]:
    """Every field of a recipe by its last name, as an option would be written: batch-size is train.batch_size."""
    from trainer.config import Config

    found: dict[str, list[str]] = {}
    for field in _fields(Config, ""):
        found.setdefault(field.rpartition(".")[2].replace("_", "-"), []).append(field)
    return {name: fields[-1] for name, fields in found.items()}


def _fields(kind: type, where: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.metadata.get(DERIVED):
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{where}{field.name}.")
        else:
            yield f"{where}{field.name}"


class TrainerParser(Parser):
    """A parser that knows what is an option elsewhere and a value of the recipe here."""

    def hint(self, option: str, value: str | None) -> str:
        """What to type instead."""
        name = option.lstrip("-").replace("_", "-").lower()
        known = self._option_string_actions
        if f"--{name}" in known:
            return f"did you mean --{name}?"
        if "--set" in known:
            fields = recipe_fields()
            if name in PRECISION:
                return "a value of the recipe: --set train.precision=bf16"
            if field := FIELDS.get(name) or fields.get(name):
                return f"a value of the recipe: --set {field}={'VALUE' if value is None else value}"
        for words, names in OPTIONS.items():
            needed = {words.split()[0]} | ({"--set"} if words.startswith("--run") else set())
            if name in names and needed <= set(known):
                return f"here it is {words.format('VALUE' if value is None else value)}"
        if "--set" in known and not nearest(option, known) and (near := nearest(name, fields, 0.8)):
            return f"a value of the recipe: --set {fields[near]}={'VALUE' if value is None else value}"
        return super().hint(option, value)
