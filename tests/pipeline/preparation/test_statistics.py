"""Statistics equal NumPy's over all pixels, and merging in any order gives the same bytes."""

import functools
import itertools
import json

import numpy as np
import pytest

from pipeline.preparation import statistics
from pipeline.preparation.statistics import Accumulator, Totals, eigen, summarize, to_npz, totals_from_json

pytestmark = pytest.mark.numeric


def images(count: int, channels: int = 3, side: int = 12) -> np.ndarray:
    rng = np.random.default_rng(count)
    color = rng.integers(0, 180, (count, 1, 1, 1))
    return (color + rng.integers(0, 76, (count, side, side + 1, channels))).astype(np.uint8)


def totals(rows: list[np.ndarray] | np.ndarray) -> Totals:
    accumulator = Accumulator(rows[0].shape[2])
    for row in rows:
        accumulator.add(row)
    return accumulator.totals()


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_numpy_over_all_pixels(channels: int) -> None:
    rows = images(20, channels)
    arrays = summarize(totals(rows))
    flat = rows.reshape(-1, channels).astype(np.float64)
    np.testing.assert_allclose(arrays["mean"], flat.mean(0), rtol=1e-13)
    np.testing.assert_allclose(arrays["covariance"], np.cov(flat.T, bias=True).reshape(channels, channels), rtol=1e-11)
    np.testing.assert_allclose(arrays["mean_image"], rows.astype(np.float64).mean(0), rtol=1e-13)
    assert int(arrays["num_pictures"]) == 20
    assert int(arrays["num_pixels"]) == len(flat)


def test_eigenvectors_equal_lapack_up_to_sign() -> None:
    arrays = summarize(totals(images(50)))
    values, vectors = np.linalg.eigh(arrays["covariance"])
    np.testing.assert_allclose(arrays["eigenvalues"], values[::-1], rtol=1e-10)
    cosines = np.abs((arrays["eigenvectors"] * vectors[:, ::-1]).sum(0))
    np.testing.assert_allclose(cosines, 1, atol=1e-10)
    assert all(column[np.abs(column).argmax()] > 0 for column in arrays["eigenvectors"].T)


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.eye(3), np.array([[4.0]]), np.array([[2.0, 2.0], [2.0, 2.0]])])
def test_eigen_of_degenerate_matrices(matrix: np.ndarray) -> None:
    values, vectors = eigen(matrix)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, matrix, atol=1e-12)


def test_merging_in_any_order_gives_the_same_bytes() -> None:
    rows = images(30)
    parts = [totals(rows[:1]), totals(rows[1:13]), totals(rows[13:20]), totals(rows[20:])]
    files = {to_npz(summarize(functools.reduce(Totals.merge, order))) for order in itertools.permutations(parts)}
    assert files == {to_npz(summarize(totals(rows)))}


def test_mixed_sizes_have_no_mean_image_but_exact_colors() -> None:
    rows = [*images(3), *images(2, side=20), *images(2)]
    found = totals(rows)
    flat = np.concatenate([row.reshape(-1, 3) for row in rows]).astype(np.int64)
    assert found.position_sum is None
    assert found.shape is None
    assert found.channel_sum == tuple(flat.sum(0).tolist())
    assert found.product_sum == tuple(map(tuple, (flat.T @ flat).tolist()))
    assert "mean_image" not in summarize(found)
    merged = totals(rows[:3]).merge(totals(rows[3:5])).merge(totals(rows[5:]))
    assert merged == found


def test_nothing_merges_as_nothing() -> None:
    empty, one = Accumulator(3).totals(), totals(images(2))
    assert empty.merge(one) is one
    assert one.merge(empty) is one


def test_sums_stay_exact_when_32_bits_would_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "FOLD_EVERY", 3)
    white = np.full((2, 2, 3), 255, np.uint8)
    found = totals([white] * 10)
    assert found.channel_sum == (10200,) * 3
    assert found.product_sum == ((10 * 4 * 65025,) * 3,) * 3


def test_json_round_trip() -> None:
    found = totals(images(4))
    again = totals_from_json(json.loads(json.dumps(found.to_json())), found.position_sum)
    assert again == found


def test_the_fold_comes_before_the_overflow() -> None:
    assert statistics.FOLD_EVERY * 255 < 2**16
    assert 128 * 128 * statistics.FLOAT_ROWS <= 2**24
    assert 128 * 128 * statistics.INT8_ROWS < 2**31


@pytest.mark.parametrize("value", [0, 127, 255])
@pytest.mark.parametrize("side", [63, 256, 601])
def test_large_images_of_extreme_values_are_summed_exactly(value: int, side: int) -> None:
    found = totals([np.full((side, side, 3), value, np.uint8)] * 2)
    assert found.channel_sum == (2 * side * side * value,) * 3
    assert found.product_sum == ((2 * side * side * value**2,) * 3,) * 3


def test_large_noise_is_summed_exactly() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3)).astype(np.uint8)
    flat = noise.reshape(-1, 3).astype(np.int64)
    assert totals([noise]).product_sum == tuple(map(tuple, (flat.T @ flat).tolist()))
    assert totals([noise]).position_sum is None  # above MAX_POSITIONS


@pytest.mark.parametrize("size", [0, 1, 47, 16 * 5, 4096, 70_000])
@pytest.mark.parametrize("channels", [1, 3])
def test_products_of_floats_and_of_bytes_equal_those_of_wide_integers(
    size: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(statistics, "INT8_ROWS", 1000)  # several pieces
    noise = np.random.default_rng(size).choice(np.array([0, 1, 127, 128, 255], np.uint8), size * channels)
    centered = noise.reshape(-1, channels).astype(np.int64) - 128
    np.testing.assert_array_equal(statistics.float_products(noise, channels), centered.T @ centered)
    if statistics.multiplies_bytes(torch):
        np.testing.assert_array_equal(statistics.int8_products(noise, channels, torch), centered.T @ centered)


def test_a_cpu_whose_byte_products_saturate_is_not_asked() -> None:
    import torch

    class Saturating:
        """torch on a CPU that adds pairs of unsigned times signed bytes in 16 bits."""

        from_numpy = staticmethod(torch.from_numpy)

        class cpu:
            @staticmethod
            def get_capabilities() -> dict[str, bool]:
                return {"avx512_vnni": True}

        @staticmethod
        def _int_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            pairs = ((left.int() + 128)[:, :, None] * right.int()[None]).view(len(left), -1, 2, right.shape[1])
            clipped = pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1)
            return (clipped - 128 * right.int().sum(0)).int()

    assert not statistics.multiplies_bytes(Saturating)
