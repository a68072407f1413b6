"""What the experiments change of a recipe: one thing each, the authors' own nets where the recipe is theirs."""

import dataclasses
import re
import shlex

import pytest

from tests.helpers.recipes import CONFIGS, recipe
from trainer.config import Config
from trainer.errors import RecipeError
from trainer.experiments.ablations import TRUE_NETS, TRUE_SCHEDULES
from trainer.experiments.catalog import EXPERIMENTS, make_experiment
from trainer.experiments.variants import OF_EVERY_RUN, Variant

RECIPES = (
    "original",
    "paper",
    "handsoff",
    "original-2010",
    "digits",
    "fashion-short",
    "photo-crops",
    "mnist",
    "cifar10",
)
README = (CONFIGS / "README.md").read_text()


def variants(name: str, config: Config) -> dict[str, Variant]:
    return {variant.name: variant for variant in make_experiment(name, config).variants}


def changed(base: Config, variant: Variant) -> set[str]:
    """The fields in which a variant's recipe differs, but for what every run has."""
    found = set()
    for section in dataclasses.fields(Config):
        first, second = getattr(base, section.name), getattr(variant.recipe(base), section.name)
        for field in dataclasses.fields(first):
            if getattr(first, field.name) != getattr(second, field.name):
                found.add(f"{section.name}.{field.name}")
    return found - {text.partition("=")[0] for text in OF_EVERY_RUN} - {"data.crop_px"}


@pytest.mark.parametrize("name", RECIPES)
def test_each_ablation_changes_one_thing(name: str) -> None:
    """On a recipe of one's own; a net of another number of towers is its widths, too."""
    base = recipe(name, "train.epochs=3")
    found = variants("ablations", base)
    true = base.model == recipe("original").model
    widths = {"model.towers", "model.channels", "model.hidden"}
    expected = {
        "baseline": set(),
        "no-normalization": {"model.post_ops"},
        "no-overlap": {"model.pool_px"} | ({"model.pool_ceil", "model.paddings"} if true else set()),
        "no-crossings": {"model.crossings"} | ({"model.channels", "model.hidden"} if true else set()),
        "all-crossings": widths,
        "half-size": widths,
        "no-dropout": {"model.dropout"},
        "no-color-shift": {"data.color"},
        "fp16-wire": {"train.comm_dtype"},
    }
    assert {each: changed(base, variant) for each, variant in found.items()} == {each: expected[each] for each in found}
    left_out = len(make_experiment("ablations", base).left_out)
    assert len(found) + left_out == len(expected), "what is left out is told"
    assert found["fp16-wire"].processes == 2, "in one process nothing crosses"


def rows_of_readme(run: str) -> list[str]:
    """The values of a row of the tables in configs/README.md."""
    (words,) = re.findall(rf"^\| {re.escape(run)} \| `(--set .+?)` \|", README, flags=re.MULTILINE)
    return [word for word in shlex.split(words) if word != "--set"]


@pytest.mark.parametrize(
    ("name", "title", "run"),
    [
        ("no-normalization", "no response normalization", "#148"),
        ("no-overlap", "pooling without overlap", "#147"),
        ("no-crossings", "no crossings but fc8's", "#150"),
    ],
)
def test_on_the_original_they_are_the_authors_runs(name: str, title: str, run: str) -> None:
    base = recipe("original")
    net, schedule = rows_of_readme(title), rows_of_readme(f"schedule of {run}")
    variant = variants("ablations", base)[name]
    assert variant.recipe(base) == recipe("original", *OF_EVERY_RUN, *net, *schedule)
    assert run in variant.about
    assert (TRUE_NETS[name] + TRUE_SCHEDULES[name]) == variant.values
    other = recipe("original", "train.epochs=5")
    assert variants("ablations", other)[name].recipe(other) == recipe("original", "train.epochs=5", *OF_EVERY_RUN, *net)


def test_one_tower_of_half_size_is_the_papers() -> None:
    base = recipe("original-2010")
    assert variants("ablations", base)["half-size"].recipe(base).model == recipe("half").model


def test_the_papers_figures_are_those_of_the_readme() -> None:
    """The tables there have them beside each ablation."""
    for variant in make_experiment("ablations", recipe("original")).variants:
        if variant.paper and (figures := re.findall(r"([+-][\d.]+) top-[15]", variant.paper.text)):
            assert " / ".join(figures) in README or variant.name == "no-color-shift", variant.name


def test_what_a_recipe_has_not_is_left_out() -> None:
    left_out = make_experiment("ablations", recipe("half", "model.dropout=0")).left_out
    assert len(left_out) == 5 and any("one tower" in sentence for sentence in left_out)
    assert "no response normalization" in make_experiment("ablations", recipe("fashion")).left_out[0]
    assert "fp16-wire" not in variants("ablations", recipe("original", "train.precision=bf16"))


def test_pooling_without_overlap_says_whether_fc6_changes() -> None:
    about = {name: variants("ablations", recipe(name))["no-overlap"].about for name in ("fashion-short", "digits")}
    assert "fc6 sees maps of 2 px as before" in about["fashion-short"]
    assert "fc6 sees maps of 3 px instead of 2" in about["digits"]


@pytest.mark.parametrize("name", RECIPES)
def test_figure_1_has_no_regularization_and_differs_in_activation_and_rate(name: str) -> None:
    base = recipe(name)
    found = variants("figure-1", base)
    assert len(found) == 6
    for variant in found.values():
        config = variant.recipe(base)
        assert (config.model.dropout, config.optimizer.weight_decay, config.data.mirror) == (0, 0, 0)
        assert config.data.color == "none" and config.train.evaluate_split == "train"
        assert config.optimizer.schedule == "steps" and config.optimizer.milestones == ()
        assert variant.four_layers and config.model.activation == variant.name.partition("-")[0]
    relu, tanh = found["relu-triple"].recipe(base), found["tanh-triple"].recipe(base)
    assert relu.optimizer == tanh.optimizer and found["tanh-triple"].against == "relu-triple"
    assert relu.optimizer.learning_rate == pytest.approx(3 * base.optimizer.learning_rate)
    assert relu.optimizer.bias_learning_rate == pytest.approx(3 * base.optimizer.bias_learning_rate)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("figure-3", recipe("digits"), "two towers for RGB images"),
        ("figure-3", recipe("half"), "two towers for RGB images"),
        ("figure-3", recipe("photo-crops", 'model.crossings=["fc8"]'), "towers that cross with towers that do not"),
    ],
)
def test_what_an_experiment_cannot_be_made_of_is_refused(name: str, config: Config, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_experiment(name, config)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_names_are_folders_and_each_is_compared_with_one_that_is_there(name: str) -> None:
    experiment = make_experiment(name, recipe("photo-crops"))
    names = [variant.name for variant in experiment.variants]
    assert experiment.name == name and len(set(names)) == len(names)
    for variant in experiment.variants:
        assert re.fullmatch("[a-z0-9-]+", variant.name) and (not variant.against or variant.against in names)
        assert variant.recipe(recipe("photo-crops"))
    some = experiment.only([names[-1]])
    assert {variant.against for variant in some.variants} - {""} <= {variant.name for variant in some.variants}


@pytest.mark.parametrize("name", ["digits", "mnist", "photo-crops", "handsoff"])
def test_without_normalization_everything_else_stays_in_its_order(name: str) -> None:
    base = recipe(name, "model.hidden=[64, 64]")  # not the original's net, which has a way of its own
    left = variants("ablations", base)["no-normalization"].recipe(base).model.post_ops
    assert left == tuple(tuple(op for op in ops if not op.startswith("lrn")) for ops in base.model.post_ops)
    assert sum(map(len, left)) < sum(map(len, base.model.post_ops))


def test_views_say_so_where_mirrored_views_are_strange_to_the_net() -> None:
    notes = {mirror: make_experiment("views", recipe("digits", f"data.mirror={mirror}")).notes for mirror in (0.0, 0.5)}
    assert "trains without mirror images" in notes[0.0][-1] and len(notes[0.5]) == len(notes[0.0]) - 1
