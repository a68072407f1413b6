"""The recipes against the facts of 2012, and the paper's ablations: values that build, train and matter."""

import dataclasses
import functools
import json
import re
import shlex

import numpy as np
import pytest
import torch

from pipeline.loader.augmentation import Augmentation
from pipeline.loader.config import LoaderConfig
from tests.helpers.recipes import CONFIGS, SMALL, a_batch, recipe
from tests.helpers.side_by_side import lone_tower
from trainer.config import (
    Config,
    LayerOverride,
    LrnConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from trainer.model.alexnet import AlexNet
from trainer.model.layers import DropoutDraws
from trainer.planning.describe import to_dict
from trainer.training.optimizer import PaperSGD, rates_at

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("one_thread")]

OF_2012 = ("paper", "original", "handsoff", "half", "batchnorm")


def ablations() -> list[tuple[str, list[str]]]:
    """Name and overrides of every row of the two tables in configs/README.md."""
    rows = re.findall(r"^\| ([^|]+?) \| `(--set .+?)` \|", (CONFIGS / "README.md").read_text(), flags=re.MULTILINE)
    return [(name, [word for word in shlex.split(words) if word != "--set"]) for name, words in rows]


TABLE = ablations()
ABLATIONS = [(name, values) for name, values in TABLE if not name.startswith("schedule of ")]


@functools.cache
def two_steps(config: Config) -> dict[str, torch.Tensor]:
    """Trains two steps. Returns the logits before and after, tested; checks that every parameter has learnt."""
    net = AlexNet(config.model, seed=3)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    images, labels = a_batch(config)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with torch.no_grad():
        logits = {"before": net.eval()(images)}
    net.train()
    for step in range(2):
        optimizer.zero_grad()
        net.loss(images, labels, DropoutDraws(0, step)).backward()
        optimizer.set_rates(rates_at(config.optimizer, step / 10, epochs=config.train.epochs))
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if f"{name.removesuffix('bias').replace('conv', 'post')}batch_norm.bias" in before:
            continue  # batch norm subtracts what such a bias adds, so its gradient is zero
        assert not torch.equal(parameter, before[name]), f"{name} has no gradient"
    with torch.no_grad():
        return logits | {"after": net.eval()(images)}


def test_the_table_of_ablations_is_read() -> None:
    """Every switch that the paper's text has is there."""
    names = {name for name, _ in ABLATIONS}
    assert len(names) == len(ABLATIONS) == 12
    assert {"no response normalization", "pooling without overlap", "no crossings but fc8's"} <= names
    assert {"tanh instead of ReLU", "no dropout", "no color shift", "one tower", "batch normalization"} <= names


@pytest.mark.parametrize(("name", "overrides"), ABLATIONS, ids=[name for name, _ in ABLATIONS])
def test_ablation_builds_trains_and_differs(name: str, overrides: list[str]) -> None:
    """Its outputs differ from the recipe's before and after two steps; an ablation of the data changes the draws."""
    base, ablated = recipe("original", *SMALL), recipe("original", *SMALL, *map(narrow, overrides))
    assert base != ablated
    if (
        base.train.comm_dtype != ablated.train.comm_dtype
    ):  # in one process nothing crosses; tests/trainer/training/test_runs.py
        return
    if base.model == ablated.model:
        differences = [not np.array_equal(color_of(base, epoch), color_of(ablated, epoch)) for epoch in (0, 70)]
        assert differences == [ablated.data.color == "none", ablated.data.color != "none"]
        return
    ours, theirs = two_steps(base), two_steps(ablated)
    for when in ("before", "after"):
        difference = (ours[when] - theirs[when]).norm() / ours[when].norm()
        assert difference > 1e-3, f"{name}: logits {when} training are the recipe's"


def narrow(override: str) -> str:
    """An override of the net's widths, divided by 16 (maps) or 128 (units), to fit SMALL."""
    field, _, value = override.partition("=")
    divisor = {"model.channels": 16, "model.hidden": 128}.get(field)
    return f"{field}={[width // divisor for width in json.loads(value)]}" if divisor else override


def color_of(config: Config, epoch: int) -> np.ndarray:
    """Color shifts of an epoch's first images, for made-up statistics."""
    steps = np.diag([12.0, 4.0, 2.0]) if config.data.color != "none" else np.zeros((3, 3))
    return Augmentation(config.data, seed=1, height_px=256, width_px=256, steps=steps).draw(epoch, 0, 8).shift


# Every value that decides what is computed, once more and with its source: a section of the paper, or of the program's
# files the net's (layers-145.cfg), its parameters' (layer-params-145.cfg), the images' (convdata.py), or a run's log.
NET_OF_RUN_145 = ModelConfig(
    towers=2,  # figure 2
    image_px=224,  # figure 2
    in_channels=3,
    classes=1000,  # section 2
    channels=(48, 128, 192, 192, 128),  # a tower; section 3.5, figure 2
    kernel_sizes=(11, 5, 3, 3, 3),  # section 3.5
    strides=(4, 1, 1, 1, 1),  # section 3.5
    paddings=((0, 3), (2, 2), (1, 1), (1, 1), (1, 1)),  # the net's file; conv1: (224 - 11) / 4 rounded up
    post_ops=(  # the net's file
        ("lrn", "maxpool", "relu"),
        ("relu", "lrn", "lrn_within_channel", "maxpool"),
        ("relu",),
        ("relu",),
        ("maxpool", "relu"),
    ),
    pool_px=3,  # section 3.4
    pool_stride=2,  # section 3.4
    pool_ceil=False,  # rounding up, as the program does, changes nothing here: 55, 27 and 13 px fit
    hidden=(2048, 2048),  # a tower; section 3.5, figure 2
    crossings=("conv3", "fc6", "fc7", "fc8"),  # figure 2
    activation="relu",  # section 3.1
    dropout=0.5,  # section 4.2
    dropout_kind="original",  # section 4.2: outputs times 0.5 in testing
    init_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),  # the net's file
    init_bias=(0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0),  # section 5, the net's file
    lrn=LrnConfig(
        size=5,  # section 3.3
        alpha=1e-4 / 5,  # section 3.3, the parameters' file: the program divides by the 5 maps
        beta=0.75,  # section 3.3
        k=2.0,  # section 3.3
        within_channel_size=5,  # the net's file
        within_channel_alpha=1e-3 / 25,  # the parameters' file: the program divides by the 25 pixels
    ),
)
IMAGES_OF_RUN_145 = LoaderConfig(
    crop_px=224,  # section 4.1
    crop_shared_by=32,  # convdata.py
    mirror=0.5,  # section 4.1
    mean="image_center",  # convdata.py
    normalize="none",  # convdata.py
    color="deviation",  # convdata.py: roots of the eigenvalues, on 0..255
    color_sigma=0.1,  # section 4.1
    color_off_epoch=67,  # the log
    color_divisor=1.1,  # convdata.py
    shuffle="epoch",  # not the program's order: the recipe's header says so
    last_batch="drop",  # the same
)
RULE_OF_RUN_145 = OptimizerConfig(
    learning_rate=0.01,  # section 5
    bias_learning_rate=0.02,  # the parameters' file
    momentum=0.9,  # section 5
    weight_decay=0.0005,  # section 5
    decay_biases=False,  # the parameters' file
    schedule="steps",
    milestones=(25.0, 51.0, 79.0),  # the log
    gamma=0.1,  # section 5
    bias_schedule="constant",  # the log: its drops name the weights' rate only
    layer_overrides=(LayerOverride("conv1", 67.0, 1e-5), LayerOverride("conv1", 72.0, 0.0, 0.0)),  # the log
    warmup_epochs=0.0,
)
TRAINING_OF_RUN_145 = TrainConfig(epochs=91, batch_size=128, accumulate=1, precision="fp32", comm_dtype="same")
RUN_145 = Config(NET_OF_RUN_145, IMAGES_OF_RUN_145, RULE_OF_RUN_145, TRAINING_OF_RUN_145)


def changed(config: Config, **tables: dict[str, object]) -> Config:
    """A recipe with other values in some of its tables."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in tables.items()}
    )


FACTS = {
    "original": RUN_145,
    "original-2010": changed(  # its log, and layer-params-145-2010.cfg for the biases
        RUN_145,
        data={"color_off_epoch": 68},
        optimizer={
            "milestones": (23.0, 51.0, 78.0),
            "bias_schedule": "steps",
            "bias_milestones": (78.0,),
            "bias_gamma": 0.1,
            "layer_overrides": (LayerOverride("conv1", 68.0, 1e-5), LayerOverride("conv1", 72.0, 0.0, 0.0)),
        },
        train={"epochs": 93},
    ),
    "handsoff": changed(  # the log of run #170
        RUN_145,
        data={"color_off_epoch": 68},
        optimizer={
            "schedule": "log_thirds",
            "milestones": (),
            "final_lr_ratio": 1 / 250,
            "bias_schedule": "halfway",
            "bias_gamma": 0.1,
            "layer_overrides": (LayerOverride("conv1", 74.0, 0.0, 0.0),),
        },
        train={"epochs": 95},
    ),
    "half": changed(  # layers-145-half.cfg, layer-params-145-half.cfg
        RUN_145,
        model={"towers": 1, "channels": (48, 128, 192, 192, 256), "hidden": (4096, 4096)},
        data={"color_off_epoch": 66},
        optimizer={
            "milestones": (20.0, 48.0),
            "layer_overrides": (LayerOverride("conv1", 66.0, 1e-5), LayerOverride("conv1", 72.0, 0.0, 0.0)),
        },
        train={"epochs": 96},
    ),
    "paper": changed(
        RUN_145,
        model={
            "post_ops": (  # sections 3.3 and 3.5
                ("relu", "lrn", "maxpool"),
                ("relu", "lrn", "maxpool"),
                ("relu",),
                ("relu",),
                ("relu", "maxpool"),
            ),
            "init_std": (0.01,) * 8,  # section 5
            "lrn": LrnConfig(size=5, alpha=1e-4, beta=0.75, k=2.0),  # section 3.3
        },
        data={
            "crop_shared_by": 1,  # section 4.1
            "mean": "image",  # section 2
            "color": "eigenvalue",  # section 4.1
            "color_off_epoch": -1,
            "color_divisor": 1.0,
        },
        optimizer={
            "bias_learning_rate": 0.01,  # section 5: equal for all layers
            "bias_schedule": "same",
            "schedule": "plateau",  # section 5
            "milestones": (),
            "max_drops": 3,  # section 5
            "patience": 5,
            "threshold": 0.001,
            "layer_overrides": (),
        },
        train={"epochs": 90, "precision": "auto"},  # section 5; as fast as the machine can
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_the_recipes(name: str) -> None:
    """Every value, those that the file leaves to its default included."""
    config, expected = recipe(name), FACTS[name]
    for table in dataclasses.fields(config):
        ours, theirs = (dataclasses.asdict(getattr(of, table.name)) for of in (config, expected))
        assert ours == theirs, table.name


def test_size_of_the_net_of_run_145() -> None:
    """Its parameters and multiply-accumulates are those of the paper's net."""
    facts = to_dict(recipe("original").model)
    assert (facts["parameters"], facts["multiply_accumulates"]) == (60_965_224, 724_406_816)


# Weights' rate, biases' rate, and conv1's two rates where it has its own, by epoch: just before and at every change.
SCHEDULES = {
    "original": (
        91,
        {
            0: (1e-2, 2e-2, None),
            24.999: (1e-2, 2e-2, None),
            25: (1e-3, 2e-2, None),
            50.999: (1e-3, 2e-2, None),
            51: (1e-4, 2e-2, None),
            66.999: (1e-4, 2e-2, None),
            67: (1e-4, 2e-2, (1e-5, 2e-2)),
            71.999: (1e-4, 2e-2, (1e-5, 2e-2)),
            72: (1e-4, 2e-2, (0, 0)),
            78.999: (1e-4, 2e-2, (0, 0)),
            79: (1e-5, 2e-2, (0, 0)),
            90.999: (1e-5, 2e-2, (0, 0)),
        },
    ),
    "original-2010": (
        93,
        {
            22.999: (1e-2, 2e-2, None),
            23: (1e-3, 2e-2, None),
            50.999: (1e-3, 2e-2, None),
            51: (1e-4, 2e-2, None),
            67.999: (1e-4, 2e-2, None),
            68: (1e-4, 2e-2, (1e-5, 2e-2)),
            72: (1e-4, 2e-2, (0, 0)),
            77.999: (1e-4, 2e-2, (0, 0)),
            78: (1e-5, 2e-3, (0, 0)),
            92.999: (1e-5, 2e-3, (0, 0)),
        },
    ),
    "half": (
        96,
        {
            19.999: (1e-2, 2e-2, None),
            20: (1e-3, 2e-2, None),
            47.999: (1e-3, 2e-2, None),
            48: (1e-4, 2e-2, None),
            65.999: (1e-4, 2e-2, None),
            66: (1e-4, 2e-2, (1e-5, 2e-2)),
            72: (1e-4, 2e-2, (0, 0)),
            95.999: (1e-4, 2e-2, (0, 0)),
        },
    ),
    "handsoff": (  # 250^(1/3) = 6.2996 a time
        95,
        {
            23.749: (1e-2, 2e-2, None),
            23.75: (1.58740e-3, 2e-2, None),
            47.499: (1.58740e-3, 2e-2, None),
            47.5: (2.51984e-4, 2e-3, None),
            71.249: (2.51984e-4, 2e-3, None),
            71.25: (4e-5, 2e-3, None),
            73.999: (4e-5, 2e-3, None),
            74: (4e-5, 2e-3, (0, 0)),
            94.999: (4e-5, 2e-3, (0, 0)),
        },
    ),
    "batchnorm": (95, {0: (1e-2, 2e-2, None), 94: (4e-5, 8e-5, None)}),
    "paper": (90, {0: (1e-2, 1e-2, None), 89: (1e-2, 1e-2, None)}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_the_recipes(name: str) -> None:
    """Weights' and biases' rates of runs #145 (2012), its twin of 2010, #170 and the half net, across every change."""
    epochs, expected = SCHEDULES[name]
    config = recipe(name)
    assert config.train.epochs == epochs
    for epoch, (weights, biases, conv1) in expected.items():
        rates = rates_at(config.optimizer, float(epoch), epochs=epochs)
        found = (rates.weights, rates.biases)
        assert found == (pytest.approx(weights, rel=1e-5), pytest.approx(biases, rel=1e-5)), epoch
        assert rates.layers == ({} if conv1 is None else {"conv1": pytest.approx(conv1)}), epoch
    drops = [epoch for epoch in config.optimizer.milestones if epoch not in expected]
    assert not drops, "every drop is in the table"


def test_the_papers_rates_wait_for_the_validation_error() -> None:
    """Three times, by 10, weights and biases alike."""
    config = recipe("paper")
    dropped = [rates_at(config.optimizer, 1.0, epochs=90, plateaus=n) for n in range(4)]
    assert [rates.weights for rates in dropped] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])
    assert [rates.biases for rates in dropped] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])


@pytest.mark.parametrize("epochs", [7, 95, 300])
def test_hands_off_drops_the_biases_at_half_of_any_length(epochs: int) -> None:
    """Run #170's biases fall once, at half of the epochs, whatever their number."""
    config = recipe("handsoff", f"train.epochs={epochs}").optimizer
    before, after = (rates_at(config, epochs / 2 + shift, epochs=epochs).biases for shift in (-1e-6, 0))
    assert (before, after) == (pytest.approx(0.02), pytest.approx(0.002))


@pytest.mark.parametrize(
    ("name", "milestones", "conv1", "color_off", "epochs"),
    [
        ("#147", (23, 51, 79), {79: (0, 0)}, -1, 90),
        ("#148", (22, 44, 86), {69: (1e-5, 2e-2), 73: (0, 0)}, 69, 97),
        ("#150", (25, 49, 79), {66: (1e-5, 2e-2), 72: (0, 0)}, 66, 92),
    ],
)
def test_schedules_of_the_ablations(
    name: str, milestones: tuple[int, ...], conv1: dict[int, tuple[float, float]], color_off: int, epochs: int
) -> None:
    """The second table of configs/README.md: each run's own schedule."""
    config = recipe("original", *dict(TABLE)[f"schedule of {name}"])
    assert (config.train.epochs, config.data.color_off_epoch) == (epochs, color_off)
    for drops, epoch in enumerate(milestones):
        for shift, factor in ((-1e-6, 10.0**-drops), (0, 10.0 ** -(drops + 1))):
            rates = rates_at(config.optimizer, epoch + shift, epochs=epochs)
            assert (rates.weights, rates.biases) == (pytest.approx(0.01 * factor), pytest.approx(0.02)), epoch
    for epoch, expected in conv1.items():
        assert rates_at(config.optimizer, epoch, epochs=epochs).layers["conv1"] == pytest.approx(expected)
        assert rates_at(config.optimizer, epoch - 1e-6, epochs=epochs).layers.get("conv1") != expected


def test_nets_of_the_ablations() -> None:
    """Map sizes of #147 and widths of #150 as their layer files give them; one tower is half.toml's net."""
    ablations = dict(TABLE)
    net_147 = recipe("original", *ablations["pooling without overlap"]).model
    assert list(net_147.map_sizes().values()) == [55, 28, 26, 13, 13, 13, 11, 6]
    net_150 = recipe("original", *ablations["no crossings but fc8's"]).model
    shapes = {name: tuple(p.shape) for name, p in lone_tower(net_150, "a").named_parameters()}
    assert shapes["conv2.weight"] == (160, 48, 5, 5)
    assert shapes["conv3.weight"] == (192, 160, 3, 3)
    assert shapes["fc6.weight"] == (4096, 128 * 36)
    assert shapes["fc7.weight"] == (2048, 4096)
    assert shapes["fc8.weight"] == (1000, 4096)
    half = dataclasses.replace(recipe("half").model, crossings=recipe("original").model.crossings)
    assert recipe("original", *ablations["one tower"]).model == half


def test_hands_off_is_the_same_net() -> None:
    """Run #170 differs from run #145 in its schedule only."""
    ours, theirs = recipe("handsoff"), recipe("original")
    assert ours.model == theirs.model
    assert dataclasses.replace(ours.data, color_off_epoch=67) == theirs.data


def test_half_net() -> None:
    """48-128-192-192-256, 4096 units, one tower; its parameters by hand are about those of both towers."""
    model = recipe("half").model
    assert (model.channels, model.hidden, model.towers) == ((48, 128, 192, 192, 256), (4096, 4096), 1)
    by_hand = [48 * 363, 128 * 1200, 192 * 1152, 192 * 1728, 256 * 1728, 4096 * 9216, 4096 * 4096, 1000 * 4096]
    facts = to_dict(model)
    assert facts["parameters"] == sum(by_hand) + 48 + 128 + 192 + 192 + 256 + 4096 + 4096 + 1000
    assert facts["parameters_b"] == 0
    assert facts["crossings"] == []


@pytest.mark.parametrize("name", OF_2012)
def test_large_recipes_say_that_nothing_was_measured(name: str) -> None:
    """Nobody may take the paper's figures for this project's."""
    header = (CONFIGS / f"{name}.toml").read_text().split("[model]")[0]
    assert re.search(r"not run here|not measured", header)
    assert re.search(r"not this project's|not of this project|from others", header)
