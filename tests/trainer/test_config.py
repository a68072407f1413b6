"""Recipes: what a user gets wrong is named, and a resolved recipe reads back as itself."""

from pathlib import Path

import pytest

from trainer.config import from_toml, load_config, to_toml
from trainer.errors import RecipeError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_load_and_read_back(path: Path, tmp_path: Path) -> None:
    """Every recipe of the project is valid, and its resolved text is the same recipe."""
    config = load_config(path)
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "resolved.toml") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_say_how_to_run_them(path: Path) -> None:
    """Each recipe's header has its command, hardware and expected result."""
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command", "hardware", "expected"):
        assert any(line.startswith(f"# {word}") for line in header), f"{path.name} lacks '# {word}'"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden=3", "unknown field model.hiden: did you mean model.hidden?"),
        ("train.epochs=many", "train.epochs is 'many': expected a value of type int"),
        ("train.epochs=0", "train.epochs is 0: expected 1 to 1,073,741,824"),
        ("train.precision=fp8", "train.precision is 'fp8': expected one of auto, fp32, tf32, bf16"),
        ("model.channels=[1, 2]", "model.channels is (1, 2): expected five values"),
        ("model.lrn.size=4", "model.lrn.size is 4: expected an odd number"),
        ("model.crossings=['conv3']", "fc8 among them"),
        ("model.image_px=20", "nothing is left of it after"),
        ("optimizer.learning_rate=nan", "expected a finite number"),
        ("epochs=3", "section.field=value"),
        ("data.crop_px=224", "data.crop_px: the loader's crop is model.image_px"),
        ("model.classes=1", "model.classes is 1: expected 2 or more, or 0 as the data set"),
        ("model.in_channels=2", "model.in_channels is 2: expected one of 1, 3, or 0 as the data set"),
        ("model.init=xavier", "model.init is 'xavier': expected one of std, he"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    """One clear error: the field, the value, what was expected."""
    with pytest.raises(RecipeError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)


def test_missing_and_torn_files(tmp_path: Path) -> None:
    """No such recipe, and one that is not TOML."""
    with pytest.raises(RecipeError, match="no recipe at"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "truncated.toml").write_text("[model\n")
    with pytest.raises(RecipeError, match="cannot be read as TOML"):
        load_config(tmp_path / "truncated.toml")


@pytest.mark.parametrize("text", ["c", "[model", "[model]\nlayers = 3\n"])
def test_what_is_no_recipe_text(text: str) -> None:
    """Of another version, or none at all."""
    with pytest.raises(RecipeError):
        from_toml(text)
