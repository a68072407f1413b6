"""Settings are declared once: what refuses a value is what tells its range."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest

from pipeline.loader.config import LoaderConfig
from trainer.__main__ import main
from trainer.config import Config, LayerOverride, LrnConfig, ModelConfig, OptimizerConfig, TrainConfig, load_config
from trainer.errors import RecipeError
from trainer.planning.settings import commented_recipe, tables_of
from twotower.fields import Limits, check, may_change, read_attributes, settings_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
CLASSES = (ModelConfig, LrnConfig, LoaderConfig, OptimizerConfig, LayerOverride, TrainConfig)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Settings for these tests.

    Attributes:
        count: how many,
            over two lines: with a colon.
        share, rate: of something.
        sizes: sides.
        words, kind, flag: more.
    """

    count: Annotated[int, Limits(1, odd=True, unit="px")] = may_change(3)
    share: Annotated[float, Limits(0, below=1)] = 0.5
    rate: Annotated[float | None, Limits(above=0, high=2, besides=-1, besides_means="to measure it")] = None
    sizes: Annotated[tuple[int, ...], Limits(1, length=2, order="a and b")] = (1, 2)
    words: Annotated[tuple[str, ...], Limits(choices=("x", "y"))] = ()
    kind: Literal["on", "off"] = "on"
    flag: bool = False


def problem(**values: object) -> str:
    """What is said of these values; empty where they are fine."""
    found: list[str] = []

    def require(holds: bool, field: str, value: object, expected: str) -> None:
        if not holds:
            found.append(f"{field} is {value!r}: expected {expected}")

    check(dataclasses.replace(Sample(), **values), "here", require)
    return found[0] if found else ""


@pytest.mark.parametrize(
    "values",
    [
        {}, {"count": 1}, {"share": 0}, {"share": 0.999}, {"rate": 2}, {"rate": -1}, {"rate": None}, {"sizes": (5, 7)},
        {"words": ("y", "x", "x")}, {"kind": "off"}, {"flag": True},
    ],
)  # fmt: skip
def test_what_is_allowed_is_silent(values: dict[str, object]) -> None:
    assert problem(**values) == ""


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 4}, "here.count is 4: expected an odd number, 1 or more"),
        ({"count": -1}, "here.count is -1: expected an odd number, 1 or more"),
        ({"count": True}, "here.count is True: expected a whole number"),
        ({"count": 1.0}, "here.count is 1.0: expected a whole number"),
        ({"share": 1}, "here.share is 1: expected 0 to 1, without 1"),
        ({"share": float("nan")}, "here.share is nan: expected a finite number"),
        ({"share": "half"}, "here.share is 'half': expected a finite number"),
        ({"rate": 0}, "here.rate is 0: expected 0 to 2, without 0, or -1 to measure it"),
        ({"rate": float("inf")}, "here.rate is inf: expected a finite number"),
        ({"sizes": (1,)}, "here.sizes is (1,): expected two values, a and b, each 1 or more"),
        ({"sizes": (1, 0)}, "here.sizes is (1, 0): expected two values, a and b, each 1 or more"),
        ({"sizes": (1, "2")}, "here.sizes is (1, '2'): expected a whole number"),
        ({"words": ("x", "z")}, "here.words is ('x', 'z'): expected each one of x, y"),
        ({"kind": "maybe"}, "here.kind is 'maybe': expected one of on, off"),
        ({"flag": 1}, "here.flag is 1: expected true or false"),
    ],
)
def test_the_field_the_value_and_what_was_expected(values: dict[str, object], said: str) -> None:
    assert problem(**values) == said


def test_a_docstring_gives_each_meaning_in_one_line() -> None:
    found = read_attributes(Sample)
    assert found["count"] == "how many, over two lines: with a colon."
    assert found["share"] == found["rate"] == "of something."
    count = settings_of(Sample)[0]
    assert (count.values, count.unit) == ("whole number, an odd number, 1 or more", "px")
    assert (count.meaning, count.default, count.may_change) == (found["count"], 3, True)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_has_a_meaning_and_no_other_name_has(cls: type) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    assert list(read_attributes(cls)) == names
    assert all(setting.meaning and setting.values for setting in settings_of(cls))


NUMBERS = [
    (table.name, setting.name)
    for table in tables_of(Config())
    if table.value is not None
    for setting in settings_of(table.cls)
    if isinstance(setting.default, int | float) and not isinstance(setting.default, bool)
]


@pytest.mark.parametrize(("section", "name"), NUMBERS, ids=[".".join(pair) for pair in NUMBERS])
def test_every_number_refuses_what_cannot_be(section: str, name: str) -> None:
    """None of them may be below -1, and a wrong value is told with its field and range, never by a traceback."""
    with pytest.raises(RecipeError, match=rf"^{section}\.{name} is -2.*: expected "):
        load_config(None, [f"{section}.{name}=-2"])


@pytest.mark.parametrize(
    "text",
    [
        "model.strides=[4, 0, 1, 1, 1]",
        "model.kernel_sizes=[11, -5, 3, 3, 3]",
        "model.init_std=[-1.0, 1, 1, 1, 1, 1, 1, 1]",
        "model.pool_px=0",
        "model.paddings=[[1], [1], [1], [1], [1]]",
        "model.towers=true",
        "model.lrn.within_channel_alpha=-1",
        "optimizer.milestones=[-1.0]",
        'train.loggers=["tensorboard", "comet"]',
    ],
)
def test_values_that_nobody_checked_before(text: str) -> None:
    with pytest.raises(RecipeError, match=f"^{text.partition('=')[0]} is .*: expected "):
        load_config(None, [text])


def test_words_of_a_list_may_be_given_with_commas() -> None:
    assert load_config(None, ["train.loggers=wandb, mlflow"]).train.loggers == ("wandb", "mlflow")
    assert load_config(None, ["train.loggers=[]"]).train.loggers == ()
    assert load_config(None, ["model.crossings=fc8"]).model.crossings == ("fc8",)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_commented_recipe_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    text = commented_recipe(load_config(path))
    (tmp_path / "commented.toml").write_text(text)
    assert load_config(tmp_path / "commented.toml") == load_config(path)
    assert max(map(len, (line for line in text.splitlines() if line.startswith("#")))) <= 100


def said_by(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["trainer", *words])
    status = main()
    return status, *capsys.readouterr()


def test_config_prints_every_field_with_what_is_known_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = said_by(monkeypatch, capsys, "config", "--config", "configs/paper.toml", "--set", "train.epochs=3")
    limits = "whole number, 1 to 1,073,741,824; in epochs; default 90; may change on resume"
    about = f"Passes over the training split. ({limits})"
    assert status == 0 and f"{about} epochs = 3" in " ".join(out.replace("\n# ", " ").split())
    fields = {f"{section}.{name}" for section, table in tomllib.loads(out).items() for name in table}
    assert fields == {
        f"{t.name}.{s.name}" for t in tables_of(Config()) if "." not in t.name for s in settings_of(t.cls)
    }


def test_print_config_of_train_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a data set, without a run; with --resume RUN it is that run's recipe."""
    words = ("train", "--config", "configs/digits.toml", "--set", "train.epochs=7", "--print-config")
    assert said_by(monkeypatch, capsys, *words)[0] == 0
    (tmp_path / "config.toml").write_text("[train]\nepochs = 11\n")
    status, out, _ = said_by(monkeypatch, capsys, "train", "--resume", str(tmp_path), "--print-config")
    assert status == 0 and "\nepochs = 11\n" in out
    status, _, err = said_by(monkeypatch, capsys, "train", "--resume", str(tmp_path / "none"), "--print-config")
    assert status == 2 and "no run at" in err


def test_the_page_takes_no_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = said_by(monkeypatch, capsys, "config", "--markdown", "--set", "train.epochs=3")
    assert status == 2 and "leave --config and --set out" in err
