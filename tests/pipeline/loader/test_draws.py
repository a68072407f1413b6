"""The random draws: pure functions of (seed, epoch, position), with the distributions that the recipes name."""

import subprocess
import sys

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.loader.augmentation import (
    Augmentation,
    Draws,
    Statistics,
    center_geometry,
    color_steps,
    fingerprint,
    ten_views,
)
from pipeline.loader.config import LoaderConfig

# ILSVRC-2012 deviations on 0..255 along the principal axes
DEVIATIONS = np.array([121.78, 37.09, 19.72])
AXES = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
STATISTICS = Statistics(np.full(3, 120.0), np.full(3, 60.0), None, DEVIATIONS**2, AXES)


def augmentation(seed: int = 1, **fields: object) -> Augmentation:
    config = LoaderConfig(**{"crop_px": 224, **fields})
    return Augmentation(config, seed, 256, 256, color_steps(config, STATISTICS))


@pytest.mark.parametrize("shared", [1, 3, 32])
def test_any_stretch_of_an_epoch_draws_the_same(shared: int) -> None:
    subject = augmentation(crop_shared_by=shared, color="deviation")
    whole = subject.draw(5, 0, 200)
    for first, count in ((0, 1), (7, 50), (31, 2), (199, 1), (64, 64)):
        part = subject.draw(5, first, count)
        assert np.array_equal(part.geometry, whole.geometry[first : first + count])
        assert np.array_equal(part.shift, whole.shift[first : first + count])


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 2}])
def test_another_epoch_or_seed_draws_otherwise(other: dict[str, int]) -> None:
    first = augmentation(seed=1, color="deviation").draw(0, 0, 100)
    second = augmentation(seed=other.get("seed", 1), color="deviation").draw(other.get("epoch", 0), 0, 100)
    assert (first.geometry != second.geometry).any(axis=1).mean() > 0.9
    assert np.abs(first.shift - second.shift).min() > 0


def test_geometry_covers_every_offset_evenly() -> None:
    geometry = augmentation().draw(0, 0, 66_000).geometry
    for axis in (0, 1):
        counts = np.bincount(geometry[:, axis], minlength=33)
        assert len(counts) == 33 and abs(counts - 2000).max() < 250  # 5.6 sigma of a fair draw
    assert abs(geometry[:, 2].mean() - 0.5) < 0.01
    assert abs(np.corrcoef(geometry.T) - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("probability", [0.0, 1.0, 0.25])
def test_mirror_probability(probability: float) -> None:
    share = augmentation(mirror=probability).draw(3, 0, 20_000).geometry[:, 2].mean()
    assert share == probability if probability in (0, 1) else abs(share - probability) < 0.015


def test_shared_crops_change_every_32_samples_while_color_changes_every_sample() -> None:
    draws = augmentation(crop_shared_by=32, color="deviation").draw(0, 0, 320)
    groups = draws.geometry.reshape(10, 32, 3)
    assert (groups == groups[:, :1]).all()
    assert len({tuple(group[0]) for group in groups}) == 10
    assert len(np.unique(draws.shift[:, 0])) == 320


def test_rectangular_images_have_their_own_ranges() -> None:
    config = LoaderConfig(crop_px=8)
    geometry = Augmentation(config, 0, 8, 12, color_steps(config, STATISTICS)).draw(0, 0, 500).geometry
    assert set(geometry[:, 0]) == {0, 1, 2, 3, 4} and set(geometry[:, 1]) == {0}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("deviation", 0.1 * DEVIATIONS), ("eigenvalue", 0.1 * DEVIATIONS**2 / 255)],
)
def test_color_moves_along_the_eigenvectors_in_gray_levels(recipe: str, expected: np.ndarray) -> None:
    shift = augmentation(color=recipe).draw(0, 0, 40_000).shift.astype(np.float64)
    along = shift @ AXES  # coordinates in the eigenvectors' frame
    assert np.allclose(along.std(0), expected, rtol=0.02)
    assert np.abs(along.mean(0) / expected).max() < 0.02
    assert np.abs(np.corrcoef(along.T) - np.eye(3)).max() < 0.02
    # normal, not uniform: 4.55 % beyond two deviations
    assert abs((np.abs(along[:, 0]) > 2 * expected[0]).mean() - 0.0455) < 0.004


def test_color_steps_for_ilsvrc_are_the_documented_ones() -> None:
    for recipe, expected in (("deviation", [12.2, 3.7, 2.0]), ("eigenvalue", [5.8, 0.54, 0.15])):
        lengths = np.linalg.norm(color_steps(LoaderConfig(color=recipe), STATISTICS), axis=0)
        assert np.allclose(lengths, expected, rtol=0.03)


def test_color_switches_off_at_its_epoch_and_never_touches_the_crops() -> None:
    on, off = augmentation(color="deviation"), augmentation(color="deviation", color_off_epoch=2)
    assert np.array_equal(on.draw(1, 0, 9).shift, off.draw(1, 0, 9).shift)
    assert not off.draw(2, 0, 9).shift.any() and on.draw(2, 0, 9).shift.all()
    plain = augmentation(color="none").draw(2, 0, 9)
    assert np.array_equal(plain.geometry, on.draw(2, 0, 9).geometry) and not plain.shift.any()


def test_evaluation_views() -> None:
    size = {"height_px": 256, "width_px": 256, "crop_px": 224}
    assert center_geometry(2, **size).tolist() == [[16, 16, 0], [16, 16, 0]]
    views = ten_views(**size).tolist()
    assert views[:5] == [[0, 0, 0], [32, 0, 0], [16, 16, 0], [0, 32, 0], [32, 32, 0]]
    assert views[5:] == [[x, y, 1] for x, y, _ in views[:5]]


def test_fingerprint_tells_every_difference() -> None:
    draws = augmentation(color="deviation").draw(0, 0, 4)
    keys = ("a", "b", "c", "d")
    base = fingerprint(keys, draws, epoch=0, position=0)
    assert base == fingerprint(list(keys), Draws(draws.geometry.copy(), draws.shift.copy()), epoch=0, position=0)
    assert 0 <= base < 1 << 63
    moved, tinted = draws.geometry.copy(), draws.shift.copy()
    moved[3, 1] += 1
    tinted[0, 0] += 0.01
    others = [
        fingerprint(("a", "b", "d", "c"), draws, epoch=0, position=0),
        fingerprint(keys, Draws(moved, draws.shift), epoch=0, position=0),
        fingerprint(keys, Draws(draws.geometry, tinted), epoch=0, position=0),
        fingerprint(keys, draws, epoch=1, position=0),
        fingerprint(keys, draws, epoch=0, position=1),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_px", 0), ("crop_px", 2.5), ("crop_px", True), ("crop_shared_by", 0), ("mirror", 1.5), ("mirror", "yes"),
        ("mirror", float("nan")), ("mean", "median"), ("normalize", "1"), ("color", "on"), ("color_sigma", -1.0),
        ("color_off_epoch", -2), ("color_divisor", 0.0), ("threads", -1), ("prefetch", 0),
        ("shuffle", "never"), ("last_batch", "keep"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{field} is "):
        LoaderConfig(**{field: value})


@pytest.mark.parametrize(
    "module",
    ["loader.config", *(f"commands.{name}" for name in ("bench", "inspect", "statistics", "status", "verify"))],
)
def test_a_recipe_and_a_parser_need_no_heavy_library(module: str) -> None:
    """A typo or --help must not wait for imports."""
    program = (
        f"import sys, pipeline.{module}; "
        "print([name for name in ('numpy', 'PIL', 'torch', 'nvidia', 'ray', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.0, True])
def test_a_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed is"):
        augmentation(seed=seed)  # type: ignore[arg-type]


def test_a_crop_larger_than_the_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="crop_px is 257, but the images are 256x256"):
        augmentation(crop_px=257)
