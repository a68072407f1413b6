"""The experiments by name, each made for a recipe: what the recipe has not cannot be left out of it."""

from collections.abc import Callable

from trainer.config import Config, ModelConfig
from trainer.errors import RecipeError
from trainer.experiments.ablations import TOP1, TOP5, ablations, no_crossings
from trainer.experiments.variants import BASELINE, Experiment, Metric, PaperFigure, Variant

LEVELS = (0.25, 0.1, 0.05)  # of figure 1: training errors whose epoch is noted; the paper's is the first
# Figure 1's net: the paper says that it has four layers. Maps of three convolutions, each with max pooling, then fc4.
MAPS, KERNEL_PX, POOL_PX, POOL_STRIDE = (32, 32, 64), 5, 3, 2
RATES = (("third", 1 / 3), ("same", 1.0), ("triple", 3.0))  # times the recipe's learning rate


def make_experiment(name: str, base: Config) -> Experiment:
    """An experiment on a recipe.

    Args:
        name: one of :data:`EXPERIMENTS`.
        base: the recipe.

    Raises:
        RecipeError: the recipe lacks what the experiment is about.
    """
    return EXPERIMENTS[name](base)


def last_side(image_px: int) -> int:
    """Side in px of the maps that enter fc4 of figure 1's net; below 1 where the image is too small for it."""
    side = image_px
    for _ in MAPS:
        side = -(-(side - POOL_PX) // POOL_STRIDE) + 1
    return side


def count_four_layers(model: ModelConfig) -> int:
    """Weights and biases of figure 1's net for a recipe's images and classes."""
    inputs = (model.in_channels, *MAPS)
    convolutions = sum(outputs * (inputs[i] * KERNEL_PX**2 + 1) for i, outputs in enumerate(MAPS))
    return convolutions + model.classes * (MAPS[-1] * last_side(model.image_px) ** 2 + 1)


def _figure_1(base: Config) -> Experiment:
    """ReLU and tanh."""
    if last_side(base.model.image_px) < 1:
        raise RecipeError(f"model.image_px = {base.model.image_px}: figure-1's net of four layers needs 8 px or more")
    return Experiment(
        name="figure-1",
        title="ReLU and tanh: training error against epochs",
        question="A net of four layers, without dropout, weight decay, mirror images and color shift, at a constant "
        "learning rate, as the paper's figure 1; three rates for each of the two, of which the quickest counts. "
        "Training error is that of the first 5,000 training images, center crop, ten times an epoch.",
        variants=tuple(_activation(base, kind, word, rate) for kind in ("relu", "tanh") for word, rate in RATES),
        metrics=(
            *(
                Metric(epochs_key(level), f"epochs to {level:.0%} training error".replace("%", " %"))
                for level in LEVELS
            ),
            Metric("top1_error", "training error at the end, %", 100),
        ),
        measure="epochs",
        notes=(
            "The paper gives no more of its net than four layers. This one has three convolutions of 32, 32 and 64 "
            "maps of 5 px, each with max pooling, and a fully connected layer; of the recipe it takes the images, the "
            "batch and the rates.",
            "The quickest rate is chosen by the very runs that are compared, for both alike.",
            "A level that is reached before the first look counts as missing: nothing is measured before it.",
        ),
    )


def epochs_key(level: float) -> str:
    """The row's name of the epochs to a training error."""
    return f"epochs_to_{round(100 * level)}"


def _activation(base: Config, kind: str, word: str, rate: float) -> Variant:
    """One activation at one rate, without any regularization."""
    optimizer = base.optimizer
    values = (
        f"model.activation={kind}",
        "model.dropout=0.0",
        "data.mirror=0.0",
        "data.color=none",
        "optimizer.weight_decay=0.0",
        f"optimizer.learning_rate={optimizer.learning_rate * rate}",
        f"optimizer.bias_learning_rate={optimizer.bias_learning_rate * rate}",
        "optimizer.schedule=steps",
        "optimizer.milestones=[]",
        "optimizer.bias_schedule=same",
        "optimizer.bias_milestones=[]",
        "optimizer.layer_overrides=[]",
        "train.evaluate_split=train",
        "train.precision=fp32",
    )
    names = {"relu": "ReLU", "tanh": "tanh"}
    return Variant(
        f"{kind}-{word}",
        f"{names[kind]}, {word} rate",
        f"Learning rate {optimizer.learning_rate * rate:.3g}.",
        values,
        against=f"relu-{word}" if kind == "tanh" else "",
        paper=PaperFigure("25 % training error six times later", "CIFAR-10, four layers") if kind == "tanh" else None,
        four_layers=True,
    )


def _figure_3(base: Config) -> Experiment:
    """Colored and gray kernels."""
    if base.model.towers != 2 or base.model.in_channels == 1:
        raise RecipeError(
            "figure-3 looks at the color of two towers' kernels: expected a recipe of two towers for RGB images"
        )
    crossed = no_crossings(base)
    if isinstance(crossed, str):
        raise RecipeError("model.crossings: figure-3 compares towers that cross with towers that do not")
    return Experiment(
        name="figure-3",
        title="One tower sees color, the other does not?",
        question="The share of color in the energy of conv1's kernels, tower by tower: what is left of the squared "
        "weights without each kernel's gray part. The paper finds one tower mostly without color and one mostly with "
        "it, in every run, and says that this comes of the restricted connections.",
        variants=(
            Variant(BASELINE, "towers that cross as in the paper", "Nothing is changed.", against=""),
            crossed,
        ),
        metrics=(
            Metric("color_gap", "difference between the towers' color, points", 100),
            Metric("color_a", "color of tower a, %", 100, compared=False),
            Metric("color_b", "color of tower b, %", 100, compared=False),
            Metric("gap_by_chance", "random halves that differ as much, %", 100, compared=False),
            TOP1,
        ),
        measure="color",
        notes=(
            "Whether it is the towers, random halves tell: conv1's kernels are dealt into two halves, 2,000 times; "
            "where few of these differ as much, chance does not make such a difference.",
            "Kernels of mere noise, as before training, have two thirds of their energy in color.",
            "Paper, section 6.1: \u201cThe kernels on GPU 1 are largely color-agnostic, while the kernels on GPU 2 are "
            "largely color-specific. This kind of specialization occurs during every run\u201d (ILSVRC-2010; no number "
            "is given).",
        ),
    )


def _figure_4(base: Config) -> Experiment:
    """Neighbors."""
    return Experiment(
        name="figure-4",
        title="What the net takes for alike",
        question="The five likeliest classes of test images, and the training images that are nearest to them by the "
        "Euclidean distance of fc7 (paper, figure 4). Beside it the same by pixels: the paper says that images close "
        "by fc7 are generally not close in pixels.",
        variants=(Variant(BASELINE, "the whole recipe", "Nothing is changed.", against=""),),
        metrics=(
            Metric("same_class_fc7", "neighbors of the same class, by fc7, %", 100, 1),
            Metric("same_class_pixels", "neighbors of the same class, by pixels, %", 100, 1),
            Metric("same_class_gain", "neighbors of the same class, fc7 less pixels, points", 100, 1),
            TOP1,
            TOP5,
        ),
        measure="neighbors",
        notes=("The paper gives no number for figure 4; the share of neighbors of the same class is this project's.",),
    )


def _views(base: Config) -> Experiment:
    """One view, ten views, several nets."""
    mirrored = (
        "Five of the ten views are mirrored, and this recipe trains without mirror images: they are strange to it."
    )
    return Experiment(
        name="views",
        title="Center, ten views, and the average of several nets",
        question="The error with the center crop, with ten views (corners and center, mirrored; probabilities "
        "averaged, paper section 4.1), and with the probabilities of all seeds' nets averaged (paper, table 2).",
        variants=(Variant(BASELINE, "one net", "Nothing is changed.", against=""),),
        metrics=(
            Metric("top1_center", "top-1 error, center, %", 100),
            Metric("top1_ten", "top-1 error, ten views, %", 100),
            Metric("top1_views_gain", "top-1, ten views less center, points", 100),
            Metric("top5_center", "top-5 error, center, %", 100),
            Metric("top5_ten", "top-5 error, ten views, %", 100),
            Metric("top5_views_gain", "top-5, ten views less center, points", 100),
        ),
        measure="views",
        notes=(
            "Paper: 39.0 / 18.3 % center and 37.5 / 17.0 % with ten views (ILSVRC-2010 test); one net 40.7 / 18.2 %, "
            "the average of five 38.1 / 16.4 % (ILSVRC-2012 val, ten views).",
            *(() if base.data.mirror else (mirrored,)),
        ),
    )


EXPERIMENTS: dict[str, Callable[[Config], Experiment]] = {
    "ablations": ablations,
    "figure-1": _figure_1,
    "figure-3": _figure_3,
    "figure-4": _figure_4,
    "views": _views,
}
