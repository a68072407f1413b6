"""Sums of products of channels over a picture, exactly: the one part of the statistics that costs arithmetic."""

import functools
import sys
from typing import Any

import numpy as np

CENTRE = 128  # products are summed of values minus this
FLOAT_PIXELS = 4  # pixels in a row of the float32 matrix
FLOAT_ROWS = 1024  # 128 * 128 * 1,024 = 2^24: float32 is exact
FLOAT_BLOCKS = 4  # 200 kB of float32 at a time stay in the cache
INT8_PIXELS = 16  # pixels in a row of the int8 matrix: 48 columns were the fastest of 3 to 192
INT8_ROWS = 2**16  # 128 * 128 * 65,536 = 2^30: int32 is exact


def centred_products(values: np.ndarray, channels: int) -> np.ndarray:
    """Sums of products of channels, of values minus 128.

    Several pixels make a row, so that one matrix product of the rows with themselves sums several pixels at a time;
    the blocks on its diagonal are added up. Where torch is loaded already (it resizes RGB pictures) and the CPU
    multiplies bytes exactly, the product is of int8, in under half of float32's time; both are exact, so equal.

    Args:
        values: (H * W * C,) uint8.
        channels: C.

    Returns:
        int64 (C, C).
    """
    torch = sys.modules.get("torch")
    if torch is not None and multiplies_bytes(torch):
        return int8_products(values, channels, torch)
    return float_products(values, channels)


def int8_products(values: np.ndarray, channels: int, torch: Any) -> np.ndarray:
    """:func:`centred_products` by integer matrix products."""
    row = INT8_PIXELS * channels
    even = len(values) // row * row
    signed = torch.from_numpy(np.bitwise_xor(values[:even], CENTRE).view(np.int8)).view(-1, row)  # xor: minus 128
    products = np.zeros((row, row), np.int64)
    for start in range(0, len(signed), INT8_ROWS):
        rows = signed[start : start + INT8_ROWS]
        products += torch._int_mm(rows.t(), rows).numpy()
    return _diagonal(products, INT8_PIXELS, channels) + _rest(values[even:], channels)


def float_products(values: np.ndarray, channels: int) -> np.ndarray:
    """:func:`centred_products` by float32 matrix products."""
    row = FLOAT_PIXELS * channels
    block = FLOAT_ROWS * row
    products = np.zeros((row, row), np.float64)
    even = len(values) // block * block
    signed, centred = np.empty(FLOAT_BLOCKS * block, np.uint8), np.empty(FLOAT_BLOCKS * block, np.float32)
    for start in range(0, even, FLOAT_BLOCKS * block):
        chunk = values[start : min(start + FLOAT_BLOCKS * block, even)]
        size = len(chunk)
        np.bitwise_xor(chunk, CENTRE, out=signed[:size])
        centred[:size] = signed[:size].view(np.int8)
        for rows in centred[:size].reshape(-1, FLOAT_ROWS, row):
            products += rows.T @ rows
    return _diagonal(products.astype(np.int64), FLOAT_PIXELS, channels) + _rest(values[even:], channels)


@functools.cache
def multiplies_bytes(torch: Any) -> bool:
    """Tells whether this CPU's int8 matrix product is fast and exact.

    Without VNNI it is either slow or adds pairs of products in 16 bits, where large ones saturate; so it is asked what
    it makes of the largest.
    """
    if not (torch.cpu.get_capabilities().get("avx512_vnni") and hasattr(torch, "_int_mm")):
        return False
    largest = np.repeat(np.array([0, 255, 0, 255], np.uint8), 4 * 48)
    return np.array_equal(int8_products(largest, 3, torch), float_products(largest, 3))


def _diagonal(products: np.ndarray, pixels: int, channels: int) -> np.ndarray:
    """The sum of the (C, C) blocks on the diagonal."""
    return np.einsum("iaib->ab", products.reshape(pixels, channels, pixels, channels))


def _rest(values: np.ndarray, channels: int) -> np.ndarray:
    """The same sums of the few pixels that fill no row or block."""
    rest = values.reshape(-1, channels).astype(np.int64) - CENTRE
    return rest.T @ rest
