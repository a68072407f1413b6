"""Recipes: typed, frozen, every field documented. A TOML file is overridden by ``--set section.field=value``."""

import dataclasses
import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PipelineError
from pipeline.loader.config import LoaderConfig
from trainer.config_toml import build, dump, override, require
from trainer.errors import PeerError, RecipeError

TOWERS = ("a", "b")
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
MAY_CHANGE = "may_change"  # in a field's metadata: it may while a run is under way, as it touches no weight
POST_OPS = ("relu", "tanh", "lrn", "lrn_within_channel", "batch_norm", "maxpool")


def _may_change(default: Any) -> Any:
    """A field with :data:`MAY_CHANGE`; all others are what they were when the run began."""
    return dataclasses.field(default=default, metadata={MAY_CHANGE: True})


@dataclasses.dataclass(frozen=True)
class LrnConfig:
    """Local response normalization, paper section 3.3: ``b = a / (k + alpha * sum(a_j^2))^beta``.

    Attributes:
        size: neighboring channels in the sum, odd.
        alpha: factor on the *sum*. The paper's formula says 1e-4; the original program divides by ``size``: 2e-5.
        beta: exponent.
        k: offset, so that the denominator is never small.
        within_channel_size: window side in px of the program's second normalization in layer 2, odd; each channel by
            itself, with k = 1.
        within_channel_alpha: factor on its sum; the program's 1e-3 over 25 pixels is 4e-5.
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0
    within_channel_size: int = 5
    within_channel_alpha: float = 4e-5

    def __post_init__(self) -> None:
        """Checks ranges."""
        odd = "an odd number of pixels"
        require(self.size > 0 and self.size % 2 == 1, "model.lrn.size", self.size, "an odd number of channels")
        require(self.within_channel_size % 2 == 1, "model.lrn.within_channel_size", self.within_channel_size, odd)
        require(self.alpha >= 0, "model.lrn.alpha", self.alpha, "zero or more")
        require(0 < self.beta <= 2, "model.lrn.beta", self.beta, "a number in (0, 2]")
        require(self.k > 0, "model.lrn.k", self.k, "a positive number")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The net. Sequences hold one value per layer, in the order conv1..conv5 (then fc6, fc7, fc8 where eight).

    Attributes:
        towers: 2 as in the paper, or 1 (the paper's one-GPU half net).
        image_px: side of the square input, px: of the crops that the loader takes.
        in_channels: of the input, 3 (RGB) or 1 (gray); 0: as the data set.
        classes: outputs of fc8; 0: as many as the data set has.
        channels: output channels *per tower* of conv1..conv5.
        kernel_sizes: sides of the kernels of conv1..conv5, px.
        strides: of conv1..conv5, px.
        paddings: zeros of conv1..conv5 as [top and left, bottom and right], px. conv1's [0, 3] is the original's
            geometry, which rounds up.
        post_ops: what follows each convolution, in order: relu, tanh, lrn, lrn_within_channel, batch_norm, maxpool.
        pool_px: side of the max-pooling window, px.
        pool_stride: its stride, px; smaller than the side means overlapping pooling (paper section 3.4).
        pool_ceil: whether the number of windows is rounded up, so that the last ones hang over the bottom and right
            edge, as in the original program. Only matters where the windows do not fit, as in run #147.
        hidden: units *per tower* of fc6 and fc7, two values.
        crossings: layers whose input comes from both towers; fc8 always does.
        activation: of fc6 and fc7: relu or tanh.
        dropout: probability that a unit of fc6 or fc7 is dropped in training.
        dropout_kind: original (unscaled mask in training, outputs times 1 - dropout in testing) or inverted.
        init: of the weights, normal with ``std``: ``init_std``; ``he``: (2 / inputs of a unit)^0.5 in every layer (He
            et al. 2015), which follows the net's size.
        init_std: standard deviation of the initial weights, eight values (paper section 5: 0.01 everywhere).
        init_bias: initial biases, eight values (paper: 1 in conv2, conv4, conv5, fc6, fc7).
        lrn: response normalization.
    """

    towers: int = 2
    image_px: int = 224
    in_channels: int = 3
    classes: int = 1000
    channels: tuple[int, ...] = (48, 128, 192, 192, 128)
    kernel_sizes: tuple[int, ...] = (11, 5, 3, 3, 3)
    strides: tuple[int, ...] = (4, 1, 1, 1, 1)
    paddings: tuple[tuple[int, ...], ...] = ((0, 3), (2, 2), (1, 1), (1, 1), (1, 1))
    post_ops: tuple[tuple[str, ...], ...] = (
        ("relu", "lrn", "maxpool"),
        ("relu", "lrn", "maxpool"),
        ("relu",),
        ("relu",),
        ("relu", "maxpool"),
    )
    pool_px: int = 3
    pool_stride: int = 2
    pool_ceil: bool = False
    hidden: tuple[int, ...] = (2048, 2048)
    crossings: tuple[str, ...] = ("conv3", "fc6", "fc7", "fc8")
    activation: Literal["relu", "tanh"] = "relu"
    dropout: float = 0.5
    dropout_kind: Literal["original", "inverted"] = "original"
    init: Literal["std", "he"] = "std"
    init_std: tuple[float, ...] = (0.01,) * 8
    init_bias: tuple[float, ...] = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    lrn: LrnConfig = dataclasses.field(default_factory=LrnConfig)

    def __post_init__(self) -> None:
        """Checks lengths, ranges and that every layer keeps a positive size."""
        require(self.towers in (1, 2), "model.towers", self.towers, "1 or 2")
        require(
            self.in_channels in (0, 1, 3),
            "model.in_channels",
            self.in_channels,
            "1 (gray), 3 (RGB) or 0 (as the data set)",
        )
        fits = self.classes >= 2 or self.classes == 0
        require(fits, "model.classes", self.classes, "2 or more, or 0 (as the data set)")
        for field in ("channels", "kernel_sizes", "strides", "paddings", "post_ops"):
            values = getattr(self, field)
            require(len(values) == 5, f"model.{field}", values, "five values, conv1..conv5")
        for field in ("init_std", "init_bias"):
            values = getattr(self, field)
            require(len(values) == 8, f"model.{field}", values, "eight values, conv1..fc8")
        unused = self.init == "he" and self.init_std != ModelConfig.init_std
        require(not unused, "model.init_std", self.init_std, "none beside model.init = 'he', which computes it")
        for pair in self.paddings:
            pairs = "pairs [before, after] of zero or more px"
            require(len(pair) == 2 and min(pair) >= 0, "model.paddings", self.paddings, pairs)
        for names in self.post_ops:
            require(set(names) <= set(POST_OPS), "model.post_ops", names, f"a list out of {', '.join(POST_OPS)}")
            require(names.count("batch_norm") <= 1, "model.post_ops", names, "at most one batch_norm per layer")
        known = set(self.crossings) <= {"conv3", "fc6", "fc7", "fc8"}
        require(known, "model.crossings", self.crossings, "conv3, fc6, fc7, fc8")
        require("fc8" in self.crossings, "model.crossings", self.crossings, "fc8 among them: the loss sees both towers")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a probability in [0, 1)")
        fits = len(self.hidden) == 2 and min(self.hidden) > 0
        require(fits, "model.hidden", self.hidden, "two positive numbers, fc6 and fc7")
        require(0 < self.pool_stride <= self.pool_px, "model.pool_stride", self.pool_stride, "1 to model.pool_px")
        for name, size in self.map_sizes().items():
            require(size > 0, "model.image_px", self.image_px, f"a larger input: nothing is left of it after {name}")

    def map_sizes(self) -> dict[str, int]:
        """Side in px of each convolution's output (``conv1``), and after its pooling (``pool1``) where pooled."""
        sizes: dict[str, int] = {}
        side = self.image_px
        for i in range(5):
            side = (side + sum(self.paddings[i]) - self.kernel_sizes[i]) // self.strides[i] + 1
            sizes[f"conv{i + 1}"] = side
            if "maxpool" in self.post_ops[i]:
                side = self.pooled_side(side)
                sizes[f"pool{i + 1}"] = side
        return sizes

    def pooled_side(self, side: int) -> int:
        """Side in px of a map of ``side`` px after max pooling."""
        over = self.pool_stride - 1 if self.pool_ceil else 0
        return (side - self.pool_px + over) // self.pool_stride + 1

    @property
    def final_side(self) -> int:
        """Side in px of the maps that enter fc6."""
        return list(self.map_sizes().values())[-1]


@dataclasses.dataclass(frozen=True)
class LayerOverride:
    """A layer's own learning rate from some epoch on, whatever the schedule says: run #145's late change of conv1.

    Attributes:
        layer: conv1 ... fc8.
        epoch: passes over the training split after which it holds, until a later one of the same layer.
        learning_rate: of the layer's weights; 0 freezes them, and their velocities.
        bias_learning_rate: of the layer's biases, the same way; absent: they go on as scheduled. (The logs' "set epsw"
            changes the weights only.)
    """

    layer: str
    epoch: float
    learning_rate: float
    bias_learning_rate: float | None = None

    def __post_init__(self) -> None:
        """Checks ranges."""
        require(self.layer in LAYERS, "optimizer.layer_overrides.layer", self.layer, f"one of {', '.join(LAYERS)}")
        require(self.epoch >= 0, "optimizer.layer_overrides.epoch", self.epoch, "zero or more")
        for field in ("learning_rate", "bias_learning_rate"):
            value = getattr(self, field)
            require(value is None or value >= 0, f"optimizer.layer_overrides.{field}", value, "zero or more")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The paper's rule, section 5: ``v = momentum v - weight_decay lr w - lr gradient; w = w + v``.

    Attributes:
        learning_rate: of the weights.
        bias_learning_rate: of the biases (the original program: twice the weights').
        momentum: factor on the velocity.
        weight_decay: factor on the weights, inside the learning rate.
        decay_biases: whether biases decay too (the program: no).
        schedule: how the rates fall. ``steps``: by ``gamma`` at each of ``milestones``. ``log_thirds``: to
            ``final_lr_ratio`` in all, a third of it in logarithm at 25, 50 and 75 % of the epochs (run #170).
            ``plateau``: by ``gamma`` where the held-out error has stopped falling, as the paper's authors did by hand.
        milestones: of ``steps``: epochs, rising, may be fractions.
        gamma: of ``steps`` and ``plateau``; the paper divides by 10.
        final_lr_ratio: of ``log_thirds``: last rate over first rate; run #170: 1 / 250, so a 6.3rd each time.
        patience: of ``plateau``: evaluations without a fall of the error before a drop.
        threshold: of ``plateau``: smallest fall of the top-1 error (0..1) that counts.
        max_drops: most drops of ``plateau``; the paper's three.
        bias_schedule: how the biases' rate falls. ``same``: as the weights'. ``constant``: never (run #145).
            ``halfway``: once, by ``bias_gamma``, at half of the epochs (run #170). ``steps``: by
            ``bias_gamma`` at each of ``bias_milestones``.
        bias_milestones: of ``steps``: epochs, rising.
        bias_gamma: of ``halfway`` and ``steps``; run #170: 0.02 to 0.002.
        layer_overrides: layers that get rates of their own from some epoch on.
        warmup_epochs: epochs over which the rates rise linearly from zero; 0 in the paper.
    """

    learning_rate: float = 0.01
    bias_learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0005
    decay_biases: bool = False
    schedule: Literal["steps", "log_thirds", "plateau"] = "steps"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    final_lr_ratio: float = 0.004
    patience: int = 5
    threshold: float = 0.001
    max_drops: int = 3
    bias_schedule: Literal["same", "constant", "halfway", "steps"] = "same"
    bias_milestones: tuple[float, ...] = ()
    bias_gamma: float = 0.1
    layer_overrides: tuple[LayerOverride, ...] = ()
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        """Checks ranges, and that no setting stands beside a schedule that would not look at it."""
        for field in ("learning_rate", "bias_learning_rate", "gamma", "bias_gamma", "final_lr_ratio"):
            require(getattr(self, field) > 0, f"optimizer.{field}", getattr(self, field), "a positive number")
        for field in ("weight_decay", "threshold", "max_drops", "warmup_epochs"):
            require(getattr(self, field) >= 0, f"optimizer.{field}", getattr(self, field), "zero or more")
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "a number in [0, 1)")
        require(self.patience >= 1, "optimizer.patience", self.patience, "1 or more")
        for field, schedule in (("milestones", self.schedule), ("bias_milestones", self.bias_schedule)):
            epochs = list(getattr(self, field))
            require(epochs == sorted(epochs), f"optimizer.{field}", epochs, "rising epochs")
            require(not epochs or schedule == "steps", f"optimizer.{field}", epochs, f"none: not used by {schedule}")
        stepped = self.bias_schedule != "steps" or self.bias_milestones
        require(bool(stepped), "optimizer.bias_milestones", (), "epochs; for biases that never drop: constant")
        for layer in {own.layer for own in self.layer_overrides}:
            epochs = [own.epoch for own in self.layer_overrides if own.layer == layer]
            require(epochs == sorted(set(epochs)), "optimizer.layer_overrides", epochs, f"rising epochs for {layer}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how often, with what arithmetic.

    Attributes:
        epochs: passes over the training split.
        batch_size: images per step; both towers see all of them.
        accumulate: pieces in which a process takes its images of a step, one after the other: the same step with less
            memory. Must divide the images per replica.
        seed: of the weights, the order of images, the augmentation and the dropout masks.
        evaluate_every_epochs: epochs between evaluations on ``evaluate_split``; 0 for only at the end.
        evaluate_split: split of the data set that is held out.
        checkpoint_every_epochs: epochs between checkpoints; one is always written at the end.
        checkpoint_every_steps: steps between checkpoints besides; 0 for none.
        keep_checkpoints: newest checkpoints kept; the best one (held-out top-1) is kept besides.
        precision: fp32, or bf16 (matrix products in bfloat16, weights and sums in float32).
        comm_dtype: number format in which activations and their gradients cross between towers: same (as computed:
            fp32, or bf16 where ``precision`` is bf16), fp16 (measured by the original: top-1 error -0.01, top-5 +0.37)
            or bf16.
        threads: threads of a process's computation on a CPU; 0: its share of the cores. They wait for each other
            actively: where the loader needs much of a core, the two are faster together with a core each
            (``trainer bench`` says so).
        peer_timeout_s: seconds after which a silent other tower counts as lost.
    """

    epochs: int = _may_change(90)
    batch_size: int = 128
    accumulate: int = 1
    seed: int = 0
    evaluate_every_epochs: int = _may_change(1)
    evaluate_split: str = _may_change("val")
    checkpoint_every_epochs: int = _may_change(1)
    checkpoint_every_steps: int = _may_change(0)
    keep_checkpoints: int = _may_change(2)
    precision: Literal["fp32", "bf16"] = "fp32"
    comm_dtype: Literal["same", "fp16", "bf16"] = "same"
    threads: int = _may_change(0)
    peer_timeout_s: float = _may_change(60.0)

    def __post_init__(self) -> None:
        """Checks ranges."""
        for field in ("epochs", "batch_size", "accumulate", "keep_checkpoints", "checkpoint_every_epochs"):
            require(getattr(self, field) >= 1, f"train.{field}", getattr(self, field), "1 or more")
        for field in ("evaluate_every_epochs", "checkpoint_every_steps", "seed", "threads"):
            require(getattr(self, field) >= 0, f"train.{field}", getattr(self, field), "zero or more")
        divides = self.batch_size % self.accumulate == 0
        require(divides, "train.accumulate", self.accumulate, f"a divisor of train.batch_size = {self.batch_size}")
        require(self.peer_timeout_s > 0, "train.peer_timeout_s", self.peer_timeout_s, "a positive number of seconds")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole recipe: tables ``[model]``, ``[model.lrn]``, ``[data]``, ``[optimizer]``, ``[train]`` of a TOML file."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Gives the loader its crop, and checks what concerns several tables."""
        object.__setattr__(self, "data", dataclasses.replace(self.data, crop_px=self.model.image_px))
        require(
            self.optimizer.schedule != "plateau" or self.train.evaluate_every_epochs > 0,
            "train.evaluate_every_epochs",
            self.train.evaluate_every_epochs,
            "1 or more: optimizer.schedule = plateau looks at the evaluations",
        )
        require(
            self.data.last_batch == "drop" or self.train.accumulate == 1,
            "train.accumulate",
            self.train.accumulate,
            "1 with data.last_batch = partial",
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of the resolved recipe: equal on every rank of a run, and kept in checkpoints."""
        return hashlib.sha256(to_toml(self).encode()).hexdigest()


def check_world(world: int) -> None:
    """Raises PeerError for a number of processes that makes no pairs."""
    if world % 2 or world < 2:
        raise PeerError(f"{world} processes were started: two towers need 2, several pairs of them a multiple of 2")


def load_config(path: Path | None, overrides: Sequence[str] = (), *, text: str = "") -> Config:
    """Reads a recipe.

    Args:
        path: TOML file, or None for the defaults (the paper's net).
        text: TOML in place of a file.
        overrides: ``section.field=value`` texts, the value in TOML syntax (a bare word is a string).

    Raises:
        RecipeError: no such file, not TOML, unknown key (the nearest one is named), wrong type or range.
    """
    table: dict[str, Any] = tomllib.loads(text)
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"no recipe at {path}: the folder configs/ holds the ones of this project") from None
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path} cannot be read as TOML: {error}") from None
    for words in overrides:
        override(table, words)
    given = table.get("data")
    if isinstance(given, dict) and "crop_px" in given:
        raise RecipeError("data.crop_px: the loader's crop is model.image_px; set that one, and leave this one out")
    try:
        return build(Config, table, "")
    except PipelineError as error:
        raise RecipeError(str(error)) from None


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML text: every field, so a run can be repeated from it alone."""
    sections = dataclasses.asdict(config)
    del sections["data"]["crop_px"]  # model.image_px
    return dump(sections)
