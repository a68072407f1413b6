"""Recipes: typed, frozen, every field documented. A TOML file is overridden by ``--set section.field=value``."""

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PipelineError
from pipeline.loader import LoaderConfig
from trainer.errors import ConfigError

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
OPERATIONS = ("relu", "tanh", "norm", "spatial_norm", "pool")


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises ConfigError naming the field, its value and what was expected."""
    if not condition:
        raise ConfigError(f"{field} = {value!r}: expected {expected}")


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Local response normalisation, paper section 3.3: ``b = a / (k + alpha * sum(a_j^2))^beta`` over ``size`` maps.

    Attributes:
        size: neighbouring maps in the sum, odd.
        alpha: factor on the *sum*. The paper's formula says 1e-4; the original program divides by ``size``: 2e-5.
        beta: exponent.
        k: offset, so that the denominator is never small.
        spatial_size: window side in px of the program's layer-2 spatial norm (same map), odd.
        spatial_alpha: factor on the sum of the spatial norm; the program's 1e-3 over 25 pixels is 4e-5.
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0
    spatial_size: int = 5
    spatial_alpha: float = 4e-5

    def __post_init__(self) -> None:
        """Checks ranges."""
        _require(self.size > 0 and self.size % 2 == 1, "norm.size", self.size, "an odd number of maps")
        _require(self.spatial_size % 2 == 1, "norm.spatial_size", self.spatial_size, "an odd number of pixels")
        _require(self.alpha >= 0, "norm.alpha", self.alpha, "zero or more")
        _require(0 < self.beta <= 2, "norm.beta", self.beta, "a number in (0, 2]")
        _require(self.k > 0, "norm.k", self.k, "a positive number")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The net. Sequences hold one value a layer, in the order conv1..conv5 (then fc6, fc7, fc8 where eight).

    Attributes:
        towers: 2 as in the paper, or 1 (the paper's one-GPU half net).
        image_px: side of the square input, px.
        channels: input channels, 3 (RGB) or 1 (gray).
        classes: outputs of fc8.
        maps: kernels *a tower* of conv1..conv5.
        kernels: kernel sides of conv1..conv5, px.
        strides: strides of conv1..conv5, px.
        pads: zeros of conv1..conv5 as [top and left, bottom and right], px. conv1's [0, 3] is the original's ceil
            geometry.
        after: what follows each convolution, in order: relu, tanh, norm, spatial_norm, pool.
        pool_px: side of the max-pooling window, px.
        pool_stride: its stride, px; smaller than the side means overlapping pooling (paper section 3.4).
        units: units *a tower* of fc6 and fc7.
        crossings: layers whose input comes from both towers; fc8 always does.
        activation: of fc6 and fc7: relu or tanh.
        dropout: probability that a unit of fc6 or fc7 is dropped in training.
        dropout_kind: original (unscaled mask in training, outputs times 1 - dropout in testing) or inverted.
        init_std: standard deviation of the initial weights, eight values (paper section 5: 0.01 everywhere).
        init_bias: initial biases, eight values (paper: 1 in conv2, conv4, conv5, fc6, fc7).
        norm: response normalisation.
    """

    towers: int = 2
    image_px: int = 224
    channels: int = 3
    classes: int = 1000
    maps: tuple[int, ...] = (48, 128, 192, 192, 128)
    kernels: tuple[int, ...] = (11, 5, 3, 3, 3)
    strides: tuple[int, ...] = (4, 1, 1, 1, 1)
    pads: tuple[tuple[int, ...], ...] = ((0, 3), (2, 2), (1, 1), (1, 1), (1, 1))
    after: tuple[str, ...] = ("relu norm pool", "relu norm pool", "relu", "relu", "relu pool")
    pool_px: int = 3
    pool_stride: int = 2
    units: int = 2048
    crossings: tuple[str, ...] = ("conv3", "fc6", "fc7", "fc8")
    activation: Literal["relu", "tanh"] = "relu"
    dropout: float = 0.5
    dropout_kind: Literal["original", "inverted"] = "original"
    init_std: tuple[float, ...] = (0.01,) * 8
    init_bias: tuple[float, ...] = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    norm: NormConfig = dataclasses.field(default_factory=NormConfig)

    def __post_init__(self) -> None:
        """Checks lengths, ranges and that every map keeps a positive size."""
        _require(self.towers in (1, 2), "model.towers", self.towers, "1 or 2")
        _require(self.channels in (1, 3), "model.channels", self.channels, "1 (gray) or 3 (RGB)")
        _require(self.classes >= 2, "model.classes", self.classes, "2 or more")
        for field, length in (("maps", 5), ("kernels", 5), ("strides", 5), ("pads", 5), ("after", 5)):
            _require(
                len(getattr(self, field)) == length, f"model.{field}", getattr(self, field), "five values, conv1..conv5"
            )
        for field in ("init_std", "init_bias"):
            _require(len(getattr(self, field)) == 8, f"model.{field}", getattr(self, field), "eight values, conv1..fc8")
        for pad in self.pads:
            _require(
                len(pad) == 2 and min(pad) >= 0, "model.pads", self.pads, "pairs [before, after] of zero or more px"
            )
        for text in self.after:
            _require(set(text.split()) <= set(OPERATIONS), "model.after", text, f"words out of {', '.join(OPERATIONS)}")
        _require(
            set(self.crossings) <= {"conv3", "fc6", "fc7", "fc8"},
            "model.crossings",
            self.crossings,
            "conv3, fc6, fc7, fc8",
        )
        _require(
            "fc8" in self.crossings, "model.crossings", self.crossings, "fc8 among them: the loss sees both towers"
        )
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a probability in [0, 1)")
        _require(self.units > 0, "model.units", self.units, "a positive number")
        for name, size in self.map_sizes().items():
            _require(size > 0, "model.image_px", self.image_px, f"a larger input: nothing is left of it after {name}")

    def map_sizes(self) -> dict[str, int]:
        """Side in px of the maps of each convolution (``conv1``), and after its pooling (``pool1``) where pooled."""
        sizes: dict[str, int] = {}
        side = self.image_px
        for i in range(5):
            side = (side + sum(self.pads[i]) - self.kernels[i]) // self.strides[i] + 1
            sizes[f"conv{i + 1}"] = side
            if "pool" in self.after[i].split():
                side = (side - self.pool_px) // self.pool_stride + 1
                sizes[f"pool{i + 1}"] = side
        return sizes

    @property
    def final_side(self) -> int:
        """Side in px of the maps that enter fc6."""
        return list(self.map_sizes().values())[-1]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The paper's rule, section 5: ``v = momentum v - weight_decay lr w - lr gradient; w = w + v``.

    Attributes:
        learning_rate: of the weights.
        bias_learning_rate: of the biases (the original program: twice the weights').
        momentum: factor on the velocity.
        weight_decay: factor on the weights, inside the learning rate.
        decay_biases: whether biases decay too (the program: no).
        drop_epochs: epochs (may be fractions) at which both rates are multiplied by ``drop_factor``.
        drop_factor: see above; the paper divides by 10.
        warmup_epochs: epochs over which the rate rises linearly from zero; 0 in the paper.
    """

    learning_rate: float = 0.01
    bias_learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0005
    decay_biases: bool = False
    drop_epochs: tuple[float, ...] = ()
    drop_factor: float = 0.1
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        """Checks ranges."""
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "a positive number")
        _require(
            self.bias_learning_rate > 0, "optimizer.bias_learning_rate", self.bias_learning_rate, "a positive number"
        )
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "a number in [0, 1)")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "zero or more")
        _require(self.drop_factor > 0, "optimizer.drop_factor", self.drop_factor, "a positive number")
        _require(
            list(self.drop_epochs) == sorted(self.drop_epochs),
            "optimizer.drop_epochs",
            self.drop_epochs,
            "rising epochs",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how often, with what arithmetic.

    Attributes:
        epochs: passes over the training split.
        batch_size: pictures a step; both towers see all of them.
        seed: of the weights, the order of pictures, the augmentation and the dropout masks.
        evaluate_every_epochs: epochs between evaluations on ``evaluate_split``; 0 for only at the end.
        evaluate_split: split of the data set that is held out.
        checkpoint_every_epochs: epochs between checkpoints; one is always written at the end.
        checkpoint_every_steps: steps between checkpoints besides; 0 for none.
        keep_checkpoints: newest checkpoints kept.
        precision: fp32, or bf16 (matrix products in bfloat16, weights and sums in float32).
        compile: compile the response normalisation with torch.compile (needs a C++ compiler on a CPU).
        peer_timeout_s: seconds after which a silent other tower counts as lost.
    """

    epochs: int = 90
    batch_size: int = 128
    seed: int = 0
    evaluate_every_epochs: int = 1
    evaluate_split: str = "val"
    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int = 0
    keep_checkpoints: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    peer_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        """Checks ranges."""
        for field in ("epochs", "batch_size", "keep_checkpoints", "checkpoint_every_epochs"):
            _require(getattr(self, field) >= 1, f"train.{field}", getattr(self, field), "1 or more")
        for field in ("evaluate_every_epochs", "checkpoint_every_steps", "seed"):
            _require(getattr(self, field) >= 0, f"train.{field}", getattr(self, field), "zero or more")
        _require(self.peer_timeout_s > 0, "train.peer_timeout_s", self.peer_timeout_s, "a positive number of seconds")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole recipe: tables ``[model]``, ``[model.norm]``, ``[data]``, ``[optimizer]``, ``[train]`` of a TOML file."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Checks that the loader's crop is what the net expects."""
        _require(
            self.data.crop_px == self.model.image_px,
            "data.crop_px",
            self.data.crop_px,
            f"model.image_px = {self.model.image_px}",
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of the resolved recipe: equal on every rank of a run, and kept in checkpoints."""
        return hashlib.sha256(to_toml(self).encode()).hexdigest()


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe.

    Args:
        path: TOML file, or None for the defaults (the paper's net).
        overrides: ``section.field=value`` texts, the value in TOML syntax (a bare word is a string).

    Raises:
        ConfigError: no such file, not TOML, unknown key (the nearest one is named), wrong type or range.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"no recipe at {path}: the folder configs/ holds the ones of this project") from None
        except (IsADirectoryError, PermissionError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as TOML: {error}") from None
    for text in overrides:
        _override(table, text)
    try:
        return _build(Config, table, "")
    except PipelineError as error:
        raise ConfigError(str(error)) from None


def _override(table: dict[str, Any], text: str) -> None:
    """Applies one ``section.field=value``."""
    name, equals, value = text.partition("=")
    _require(bool(equals) and "." in name, "--set", text, "section.field=value, for example --set train.epochs=3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *sections, field = name.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        _require(isinstance(table, dict), "--set", text, f"{section} to be a table")
    table[field] = parsed


def _build(cls: type, table: Mapping[str, Any], where: str) -> Any:
    """Makes a config dataclass from a TOML table; unknown keys are errors."""
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.4)
            advice = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown field {where}{key}: {advice}")
    return cls(**{key: _convert(value, hints[key], f"{where}{key}") for key, value in table.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Checks one TOML value against a field's type; lists become tuples, whole numbers may stand for floats."""
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), where, value, "a table")
        return _build(typing.cast(type, kind), value, f"{where}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        _require(value in arguments, where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), where, value, "a list")
        return tuple(_convert(item, arguments[0], where) for item in value)
    if origin in (typing.Union, types.UnionType):
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _require(type(value) is kind, where, value, f"a value of type {kind.__name__}")
    _require(not (kind is float and not math.isfinite(value)), where, value, "a finite number")
    return value


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML text: every field, so a run can be repeated from it alone."""
    lines: list[str] = []
    for section, fields in dataclasses.asdict(config).items():
        tables = {key: value for key, value in fields.items() if isinstance(value, dict)}
        lines += [
            f"[{section}]",
            *(f"{k} = {json.dumps(v)}" for k, v in fields.items() if k not in tables and v is not None),
            "",
        ]
        for name, table in tables.items():
            lines += [f"[{section}.{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items()), ""]
    return "\n".join(lines)
