"""Recipes: typed, frozen, every field documented. A TOML file is overridden by ``--set section.field=value``."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.errors import PipelineError
from pipeline.loader.config import LoaderConfig
from trainer.config_toml import build, dump, override, require
from trainer.errors import PeerError, RecipeError
from twotower.fields import Limits, check, may_change

MOST_BYTES = 1 << 20  # of a recipe; the longest of this project has 3,000
MOST_WEIGHTS = 1 << 32  # of a net; 70 times the paper's
MOST_VALUES = 1 << 28  # of one map of one image, 1 GiB
TOWERS = ("a", "b")
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
CONVOLUTIONS = "conv1..conv5"
CROSSINGS = ("conv3", "fc6", "fc7", "fc8")
LOGGERS = tuple(sorted(path.stem for path in (Path(__file__).parent / "training" / "loggers").glob("[a-z]*.py")))
POST_OPS = ("relu", "tanh", "lrn", "lrn_within_channel", "batch_norm", "maxpool")


@dataclasses.dataclass(frozen=True)
class LrnConfig:
    """Local response normalization, paper section 3.3: ``b = a / (k + alpha * sum(a_j^2))^beta``.

    Attributes:
        size: neighboring channels in the sum.
        alpha: factor on the *sum*. The paper's formula says 1e-4; the original program divides by ``size``: 2e-5.
        beta: exponent.
        k: offset, so that the denominator is never small.
        within_channel_size: window side of the program's second normalization in layer 2; each channel by itself,
            with k = 1.
        within_channel_alpha: factor on its sum; the program's 1e-3 over 25 pixels is 4e-5.
    """

    size: Annotated[int, Limits(1, odd=True, unit="channels")] = 5
    alpha: Annotated[float, Limits(0)] = 1e-4
    beta: Annotated[float, Limits(above=0, high=2)] = 0.75
    k: Annotated[float, Limits(above=0)] = 2.0
    within_channel_size: Annotated[int, Limits(1, odd=True, unit="px")] = 5
    within_channel_alpha: Annotated[float, Limits(0)] = 4e-5

    def __post_init__(self) -> None:
        """Checks limits."""
        check(self, "model.lrn", require)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The net. Sequences hold one value per layer, in the order conv1..conv5 (then fc6, fc7, fc8 where eight).

    Attributes:
        towers: 2 as in the paper, or 1 (the paper's one-GPU half net).
        image_px: side of the square input, px: of the crops that the loader takes.
        in_channels: of the input, 3 (RGB) or 1 (gray); 0: as the data set.
        classes: outputs of fc8; 0: as many as the data set has.
        channels: output channels *per tower* of conv1..conv5.
        kernel_sizes: sides of the kernels of conv1..conv5.
        strides: of conv1..conv5.
        paddings: zeros of conv1..conv5 as [top and left, bottom and right], px. conv1's [0, 3] is the original's
            geometry, which rounds up.
        post_ops: what follows each convolution, in order: relu, tanh, lrn, lrn_within_channel, batch_norm, maxpool.
        pool_px: side of the max-pooling window.
        pool_stride: its stride, at most ``pool_px``; smaller than it means overlapping pooling (paper section 3.4).
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

    towers: Annotated[int, Limits(choices=(1, 2))] = 2
    image_px: Annotated[int, Limits(1, unit="px")] = 224
    in_channels: Annotated[int, Limits(choices=(1, 3), besides=0, besides_means="as the data set")] = 3
    classes: Annotated[int, Limits(2, besides=0, besides_means="as the data set")] = 1000
    channels: Annotated[tuple[int, ...], Limits(1, length=5, order=CONVOLUTIONS)] = (48, 128, 192, 192, 128)
    kernel_sizes: Annotated[tuple[int, ...], Limits(1, length=5, order=CONVOLUTIONS, unit="px")] = (11, 5, 3, 3, 3)
    strides: Annotated[tuple[int, ...], Limits(1, length=5, order=CONVOLUTIONS, unit="px")] = (4, 1, 1, 1, 1)
    paddings: Annotated[tuple[tuple[int, ...], ...], Limits(0, length=5, order=CONVOLUTIONS, pairs=True, unit="px")] = (
        (0, 3),
        (2, 2),
        (1, 1),
        (1, 1),
        (1, 1),
    )
    post_ops: Annotated[tuple[tuple[str, ...], ...], Limits(choices=POST_OPS, length=5, order=CONVOLUTIONS)] = (
        ("relu", "lrn", "maxpool"),
        ("relu", "lrn", "maxpool"),
        ("relu",),
        ("relu",),
        ("relu", "maxpool"),
    )
    pool_px: Annotated[int, Limits(1, unit="px")] = 3
    pool_stride: Annotated[int, Limits(1, unit="px")] = 2
    pool_ceil: bool = False
    hidden: Annotated[tuple[int, ...], Limits(1, length=2, order="fc6 and fc7", unit="units")] = (2048, 2048)
    crossings: Annotated[tuple[str, ...], Limits(choices=CROSSINGS)] = CROSSINGS
    activation: Literal["relu", "tanh"] = "relu"
    dropout: Annotated[float, Limits(0, below=1)] = 0.5
    dropout_kind: Literal["original", "inverted"] = "original"
    init: Literal["std", "he"] = "std"
    init_std: Annotated[tuple[float, ...], Limits(0, length=8, order="conv1..fc8")] = (0.01,) * 8
    init_bias: Annotated[tuple[float, ...], Limits(length=8, order="conv1..fc8")] = (0.0, 1.0, 0.0, *(1.0,) * 4, 0.0)
    lrn: LrnConfig = dataclasses.field(default_factory=LrnConfig)

    def __post_init__(self) -> None:
        """Checks limits, what two fields must have in common, and that every layer keeps a positive size."""
        check(self, "model", require)
        unused = self.init == "he" and self.init_std != ModelConfig.init_std
        require(not unused, "model.init_std", self.init_std, "none beside model.init = 'he', which computes it")
        for names in self.post_ops:
            require(names.count("batch_norm") <= 1, "model.post_ops", names, "at most one batch_norm per layer")
        require("fc8" in self.crossings, "model.crossings", self.crossings, "fc8 among them: the loss sees both towers")
        require(self.pool_stride <= self.pool_px, "model.pool_stride", self.pool_stride, "1 to model.pool_px")
        for name, size in self.map_sizes().items():
            require(size > 0, "model.image_px", self.image_px, f"a larger input: nothing is left of it after {name}")
        self._check_memory()

    def _check_memory(self) -> None:
        """Refuses a net that no machine holds, before anything takes memory for it."""
        sizes = self.map_sizes()
        inputs = (self.in_channels, *(self.towers * channels for channels in self.channels))
        before = (self.image_px, *(sizes.get(f"pool{i}", sizes[f"conv{i}"]) for i in range(1, 5)))
        for i in range(5):
            name, padded = f"conv{i + 1}", before[i] + sum(self.paddings[i])
            most = max(inputs[i] * padded**2, self.towers * self.channels[i] * sizes[name] ** 2)
            words = f"smaller sizes: {name} would have {most:,} values an image, and at most {MOST_VALUES:,} are taken"
            require(most <= MOST_VALUES, "model.channels", self.channels, words)
        weights = self.count_weights()
        words = f"a smaller net: this one has {weights:,} weights, and at most {MOST_WEIGHTS:,} are taken"
        require(weights <= MOST_WEIGHTS, "model", f"a net of {weights:,} weights", words)

    def count_weights(self) -> int:
        """Weights of the whole net, without biases."""
        towers, both = self.towers, lambda layer: self.towers if layer in self.crossings else 1
        total, inputs = 0, self.in_channels
        for i, outputs in enumerate(self.channels):
            seen = inputs if i == 0 else inputs * both(f"conv{i + 1}")
            total += towers * outputs * seen * self.kernel_sizes[i] ** 2
            inputs = outputs
        inputs *= self.final_side**2
        for layer, outputs in zip(("fc6", "fc7"), self.hidden, strict=True):
            total += towers * outputs * inputs * both(layer)
            inputs = outputs
        return total + self.classes * inputs * towers

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

    layer: Annotated[str, Limits(choices=LAYERS)]
    epoch: Annotated[float, Limits(0, unit="epochs")]
    learning_rate: Annotated[float, Limits(0)]
    bias_learning_rate: Annotated[float | None, Limits(0)] = None

    def __post_init__(self) -> None:
        """Checks limits."""
        check(self, "optimizer.layer_overrides", require)


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

    learning_rate: Annotated[float, Limits(above=0)] = 0.01
    bias_learning_rate: Annotated[float, Limits(above=0)] = 0.01
    momentum: Annotated[float, Limits(0, below=1)] = 0.9
    weight_decay: Annotated[float, Limits(0)] = 0.0005
    decay_biases: bool = False
    schedule: Literal["steps", "log_thirds", "plateau"] = "steps"
    milestones: Annotated[tuple[float, ...], Limits(0, unit="epochs")] = ()
    gamma: Annotated[float, Limits(above=0)] = 0.1
    final_lr_ratio: Annotated[float, Limits(above=0)] = 0.004
    patience: Annotated[int, Limits(1, unit="evaluations")] = 5
    threshold: Annotated[float, Limits(0)] = 0.001
    max_drops: Annotated[int, Limits(0)] = 3
    bias_schedule: Literal["same", "constant", "halfway", "steps"] = "same"
    bias_milestones: Annotated[tuple[float, ...], Limits(0, unit="epochs")] = ()
    bias_gamma: Annotated[float, Limits(above=0)] = 0.1
    layer_overrides: tuple[LayerOverride, ...] = ()
    warmup_epochs: Annotated[float, Limits(0, unit="epochs")] = 0.0

    def __post_init__(self) -> None:
        """Checks limits, and that no setting stands beside a schedule that would not look at it."""
        check(self, "optimizer", require)
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
        precision: fp32; bf16 (matrix products in bfloat16, weights and sums in float32); tf32 (fp32, but a GPU rounds
            what it multiplies in fully connected layers to tf32, as cuDNN does in convolutions with fp32, too; a CPU
            does not); auto: bf16 on a GPU of 2020 or later and on processors with bf16 instructions (AVX512_BF16,
            AMX_BF16), fp32 elsewhere. What auto came to stands in RUN/config.toml, and the run keeps it.
        cuda_graph: whether the GPU repeats a whole step by itself (a CUDA graph) once three were launched kernel by
            kernel. auto: where one process trains on a GPU, and ``data.last_batch`` is drop; on: also beside a partial
            last batch, which is launched kernel by kernel, and with two processes over NCCL; off: never. Where it
            cannot be had, one line says why, and all else stays as it is.
        comm_dtype: number format in which activations and their gradients cross between towers: same (as computed:
            fp32, or bf16 where ``precision`` is bf16), fp16 (measured by the original: top-1 error -0.01, top-5 +0.37)
            or bf16.
        threads: threads of a process's computation on a CPU; 0: its share of the cores. They wait for each other
            actively: where the loader needs much of a core, the two are faster together with a core each
            (``trainer bench`` says so).
        loggers: where the figures go besides metrics.jsonl: tensorboard (RUN/tensorboard), wandb (Weights & Biases),
            mlflow; each of the other two is an extra to install, and configured by its own variables.
        peer_timeout_s: seconds after which a silent other tower counts as lost.
        start_timeout_s: the same until all processes are about to do their first step: one may have a data set to
            fetch, or a file system that opens slowly.
    """

    epochs: Annotated[int, Limits(1, 1 << 30, unit="epochs")] = may_change(90)
    batch_size: Annotated[int, Limits(1, 1 << 20, unit="images")] = 128
    accumulate: Annotated[int, Limits(1, unit="pieces")] = 1
    seed: Annotated[int, Limits(0, 1 << 53)] = 0
    evaluate_every_epochs: Annotated[int, Limits(0, unit="epochs")] = may_change(1)
    evaluate_split: str = may_change("val")
    checkpoint_every_epochs: Annotated[int, Limits(1, unit="epochs")] = may_change(1)
    checkpoint_every_steps: Annotated[int, Limits(0, unit="steps")] = may_change(0)
    keep_checkpoints: Annotated[int, Limits(1, unit="checkpoints")] = may_change(2)
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "fp32"
    cuda_graph: Literal["auto", "on", "off"] = may_change("auto")
    comm_dtype: Literal["same", "fp16", "bf16"] = "same"
    threads: Annotated[int, Limits(0, 1024, unit="threads")] = may_change(0)
    loggers: Annotated[tuple[str, ...], Limits(choices=LOGGERS)] = may_change(("tensorboard",))
    peer_timeout_s: Annotated[float, Limits(above=0, high=1e6, unit="s")] = may_change(60.0)
    start_timeout_s: Annotated[float, Limits(above=0, high=1e6, unit="s")] = may_change(600.0)

    def __post_init__(self) -> None:
        """Checks limits, and what two fields must have in common."""
        check(self, "train", require)
        divides = self.batch_size % self.accumulate == 0
        require(divides, "train.accumulate", self.accumulate, f"a divisor of train.batch_size = {self.batch_size}")


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
            table = _parse(_read_text(path))
        except FileNotFoundError:
            raise RecipeError(f"no recipe at {path}: the folder configs/ holds the ones of this project") from None
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise RecipeError(f"{path} cannot be read as TOML: {error}") from None
    for words in overrides:
        override(table, words)
    given = table.get("data")
    if isinstance(given, dict) and "crop_px" in given:
        raise RecipeError("data.crop_px: the loader's crop is model.image_px; set that one, and leave this one out")
    try:
        return build(Config, table, "")
    except (PipelineError, RecipeError) as error:
        where = f"{path}: " if path is not None and not overrides else ""  # else an override may be to blame
        raise RecipeError(f"{where}{error}") from None


def from_toml(text: str) -> Config:
    """The recipe that :func:`to_toml` has written.

    Raises:
        RecipeError: it is none, or another version's.
    """
    try:
        return build(Config, _parse(text), "")
    except (PipelineError, RecipeError, ValueError) as error:
        raise RecipeError(str(error)) from None


def _read_text(path: Path) -> str:
    """The text of a recipe, which may come through a pipe; of a file that is none no more than a recipe may have."""
    with path.open("rb") as file:
        found = file.read(MOST_BYTES + 1)
    if len(found) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes, which no recipe has")
    return found.decode()


def _parse(text: str) -> dict[str, Any]:
    """TOML of anybody; raises ValueError."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML text: every field, so a run can be repeated from it alone."""
    sections = dataclasses.asdict(config)
    del sections["data"]["crop_px"]  # model.image_px
    return dump(sections)
