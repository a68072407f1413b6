"""Mean image and color covariance of the train split, from exact integer sums: any order gives the same bytes.

Sums of products of channels are the one part that costs arithmetic: :func:`centered_products`.
"""

import dataclasses
import functools
import io
import math
import sys
import zipfile
from fractions import Fraction
from typing import Any

import numpy as np

FOLD_EVERY = 257  # 257 * 255 is the last sum that fits 16 bits
COLLECT_BYTES = 2**20  # pixels of five images of 256x256, collected for one matrix product
CENTER = 128  # products are summed of values minus this
FLOAT_PIXELS = 4  # pixels in a row of the float32 matrix
FLOAT_ROWS = 1024  # 128 * 128 * 1,024 = 2^24: float32 is exact
FLOAT_BLOCKS = 4  # 200 kB of float32 at a time stay in the cache
INT8_PIXELS = 16  # pixels in a row of the int8 matrix: 48 columns were the fastest of 3 to 192
INT8_ROWS = 2**16  # 128 * 128 * 65,536 = 2^30: int32 is exact
MAX_POSITIONS = 2**20  # above a million pixels per image, sums per position would cost more memory than they are worth


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over images; every number is an exact integer.

    Attributes:
        num_images: images summed.
        num_pixels: pixels summed.
        channel_sum: (C,) sum of each channel.
        product_sum: (C, C) sum of products of channels.
        shape: (H, W, C) if every image had it, else None.
        position_sum: (H, W, C) uint64 sums per position if every image had one shape, else None.
    """

    num_images: int
    num_pixels: int
    channel_sum: tuple[int, ...]
    product_sum: tuple[tuple[int, ...], ...]
    shape: tuple[int, int, int] | None
    position_sum: np.ndarray | None

    def merge(self, other: "Totals") -> "Totals":
        """The totals over both; commutative and associative."""
        if not self.num_images or not other.num_images:
            return self if self.num_images else other
        same = self.shape is not None and self.shape == other.shape
        return Totals(
            num_images=self.num_images + other.num_images,
            num_pixels=self.num_pixels + other.num_pixels,
            channel_sum=tuple(a + b for a, b in zip(self.channel_sum, other.channel_sum, strict=True)),
            product_sum=tuple(
                tuple(a + b for a, b in zip(row, other_row, strict=True))
                for row, other_row in zip(self.product_sum, other.product_sum, strict=True)
            ),
            shape=self.shape if same else None,
            position_sum=self.position_sum + other.position_sum
            if same and self.position_sum is not None and other.position_sum is not None
            else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the sums per position."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "position_sum"
        }


def totals_from_json(raw: dict[str, Any], position_sum: np.ndarray | None) -> Totals:
    """The inverse of :meth:`Totals.to_json`."""
    return Totals(
        num_images=raw["num_images"],
        num_pixels=raw["num_pixels"],
        channel_sum=tuple(raw["channel_sum"]),
        product_sum=tuple(tuple(row) for row in raw["product_sum"]),
        shape=None if raw["shape"] is None else (raw["shape"][0], raw["shape"][1], raw["shape"][2]),
        position_sum=position_sum,
    )


class Accumulator:
    """Sums images one by one, exactly.

    Images of one size are summed per position in 16 bits and folded into 64 bits before those can overflow.
    Products are summed of values minus 128, small enough for fast exact sums; :meth:`totals` moves them back.

    Args:
        channels: C of every image.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._num_images = 0
        self._num_pixels = 0
        self._channel_sum = np.zeros(channels, np.int64)  # of the images that are not in the sums per position
        self._centered_products = np.zeros((channels, channels), np.int64)
        self._shape: tuple[int, int, int] | None = None
        self._position_sum: np.ndarray | None = None
        self._pending_sum = np.zeros(0, np.uint16)
        self._pending = 0
        self._collected = np.zeros(0, np.uint8)
        self._num_collected = 0

    def add(self, pixels: np.ndarray) -> None:
        """Adds one image, uint8 (H, W, C)."""
        shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
        if not self._num_images:
            self._start(shape)
        self._num_images += 1
        self._num_pixels += shape[0] * shape[1]
        values = pixels.reshape(-1)
        self._collect(values)
        if shape != self._shape and self._shape is not None:
            self._forget_positions()
        if self._position_sum is None:
            self._channel_sum += values.reshape(-1, self._channels).sum(0, dtype=np.int64)
            return
        np.add(self._pending_sum, values, out=self._pending_sum)
        self._pending += 1
        if self._pending == FOLD_EVERY:
            self._fold()

    def totals(self) -> Totals:
        """The sums so far."""
        self._fold()
        self._multiply()
        sums = self._channel_sum.copy()
        if self._position_sum is not None:
            sums += self._position_sum.reshape(-1, self._channels).sum(0).astype(np.int64)
        shift = CENTER * (sums[:, None] + sums[None, :]) - CENTER**2 * self._num_pixels
        return Totals(
            num_images=self._num_images,
            num_pixels=self._num_pixels,
            channel_sum=tuple(sums.tolist()),
            product_sum=tuple(tuple(row) for row in (self._centered_products + shift).tolist()),
            shape=self._shape,
            position_sum=None if self._position_sum is None else self._position_sum.reshape(self._shape or ()).copy(),
        )

    def _collect(self, values: np.ndarray) -> None:
        """Keeps values until there are enough for a matrix product: one for several images costs less each."""
        if self._num_collected + len(values) > COLLECT_BYTES:
            self._multiply()
        if len(values) > COLLECT_BYTES:
            self._centered_products += centered_products(values, self._channels)
            return
        if not len(self._collected):
            self._collected = np.empty(COLLECT_BYTES, np.uint8)
        self._collected[self._num_collected : self._num_collected + len(values)] = values
        self._num_collected += len(values)

    def _multiply(self) -> None:
        """Adds the products of what was collected."""
        self._centered_products += centered_products(self._collected[: self._num_collected], self._channels)
        self._num_collected = 0

    def _start(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        if shape[0] * shape[1] <= MAX_POSITIONS:
            self._position_sum = np.zeros(math.prod(shape), np.uint64)
            self._pending_sum = np.zeros(math.prod(shape), np.uint16)

    def _fold(self) -> None:
        """Moves the pending 16-bit sums into the 64-bit ones."""
        if self._position_sum is not None and self._pending:
            self._position_sum += self._pending_sum
            self._pending_sum[:] = 0
            self._pending = 0

    def _forget_positions(self) -> None:
        """An image of another size came: only sums over channels go on."""
        self._fold()
        if self._position_sum is not None:
            self._channel_sum += self._position_sum.reshape(-1, self._channels).sum(0).astype(np.int64)
        self._shape = self._position_sum = None


def centered_products(values: np.ndarray, channels: int) -> np.ndarray:
    """Sums of products of channels, of values minus 128.

    Several pixels make a row, so that one matrix product of the rows with themselves sums several pixels at a time;
    the blocks on its diagonal are added up. Where torch is loaded already (it resizes RGB images) and the CPU
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
    """:func:`centered_products` by integer matrix products."""
    row = INT8_PIXELS * channels
    even = len(values) // row * row
    signed = torch.from_numpy(np.bitwise_xor(values[:even], CENTER).view(np.int8)).view(-1, row)  # xor: minus 128
    products = np.zeros((row, row), np.int64)
    for start in range(0, len(signed), INT8_ROWS):
        rows = signed[start : start + INT8_ROWS]
        products += torch._int_mm(rows.t(), rows).numpy()
    return _diagonal(products, INT8_PIXELS, channels) + _rest(values[even:], channels)


def float_products(values: np.ndarray, channels: int) -> np.ndarray:
    """:func:`centered_products` by float32 matrix products."""
    row = FLOAT_PIXELS * channels
    block = FLOAT_ROWS * row
    products = np.zeros((row, row), np.float64)
    even = len(values) // block * block
    signed, centered = np.empty(FLOAT_BLOCKS * block, np.uint8), np.empty(FLOAT_BLOCKS * block, np.float32)
    for start in range(0, even, FLOAT_BLOCKS * block):
        chunk = values[start : min(start + FLOAT_BLOCKS * block, even)]
        size = len(chunk)
        np.bitwise_xor(chunk, CENTER, out=signed[:size])
        centered[:size] = signed[:size].view(np.int8)
        for rows in centered[:size].reshape(-1, FLOAT_ROWS, row):
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
    rest = values.reshape(-1, channels).astype(np.int64) - CENTER
    return rest.T @ rest


def summarize(totals: Totals) -> dict[str, np.ndarray]:
    """The arrays of statistics.npz, values on 0..255.

    Returns:
        ``mean`` float64 (C,), ``covariance`` (C, C), ``eigenvalues`` (C,) descending, ``eigenvectors`` (C, C) in
        columns, ``num_pictures``, ``num_pixels`` and, if every image had one size, ``mean_image`` (H, W, C).
    """
    count = totals.num_pixels
    mean = [Fraction(value, count) for value in totals.channel_sum]
    covariance = np.array(
        [
            [float(Fraction(value, count) - mean[first] * mean[second]) for second, value in enumerate(row)]
            for first, row in enumerate(totals.product_sum)
        ]
    )
    eigenvalues, eigenvectors = eigen(covariance)
    arrays = {
        "mean": np.array([float(value) for value in mean]),
        "covariance": covariance,
        "eigenvalues": eigenvalues,
        "eigenvectors": eigenvectors,
        "num_pictures": np.array(totals.num_images, np.int64),  # its name in every data set that exists
        "num_pixels": np.array(count, np.int64),
    }
    if totals.position_sum is not None:
        arrays["mean_image"] = totals.position_sum.astype(np.float64) / totals.num_images
    return arrays


def eigen(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (descending) and eigenvectors (columns) by Jacobi rotations.

    Not numpy.linalg.eigh: its last bits depend on the CPU (five kernels of OpenBLAS gave four results for the same
    matrices), and statistics.npz is hashed, so the same images would not give the same data set everywhere. Here it
    is plain IEEE arithmetic. The component of the largest magnitude of each vector is positive.
    """
    size = len(symmetric)
    matrix = [[float(value) for value in row] for row in symmetric]
    vectors = [[float(row == column) for column in range(size)] for row in range(size)]
    for _ in range(50):  # converges quadratically; 3x3 needs about 6 sweeps
        for first in range(size):
            for second in range(first + 1, size):
                _rotate(matrix, vectors, first, second)
    order = sorted(range(size), key=lambda index: -matrix[index][index])
    columns = []
    for index in order:
        column = [vectors[row][index] for row in range(size)]
        sign = 1.0 if max(column, key=abs) >= 0 else -1.0
        columns.append([sign * value for value in column])
    return np.array([matrix[index][index] for index in order]), np.array(columns).T.copy()


def _rotate(matrix: list[list[float]], vectors: list[list[float]], first: int, second: int) -> None:
    """One Jacobi rotation that zeroes ``matrix[first][second]`` (Golub and Van Loan, section 8.5)."""
    off = matrix[first][second]
    if off == 0.0:
        return
    theta = (matrix[second][second] - matrix[first][first]) / (2.0 * off)
    tangent = math.copysign(1.0, theta) / (abs(theta) + math.sqrt(theta * theta + 1.0))
    cosine = 1.0 / math.sqrt(tangent * tangent + 1.0)
    sine = tangent * cosine
    for rows in (matrix, vectors):
        for row in rows:
            a, b = row[first], row[second]
            row[first], row[second] = cosine * a - sine * b, sine * a + cosine * b
    for column in range(len(matrix)):
        a, b = matrix[first][column], matrix[second][column]
        matrix[first][column], matrix[second][column] = cosine * a - sine * b, sine * a + cosine * b
    matrix[first][second] = matrix[second][first] = 0.0


def to_npz(arrays: dict[str, np.ndarray]) -> bytes:
    """The arrays as an .npz file whose bytes depend on nothing else (numpy's own writer may stamp the time)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            array = io.BytesIO()
            np.lib.format.write_array(array, np.asanyarray(arrays[name]), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), array.getvalue())
    return buffer.getvalue()
