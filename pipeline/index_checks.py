"""Checks an index against its tar before anything reads by it: DALI believes every offset and size.

A size of -1 aborts the process there, one of 99,999,999 is a segmentation fault. So an index must be what ``prepare``
writes: three files a sample, each one behind the other. Bytes are looked at by NumPy, about a nanosecond each.
"""

import dataclasses

import numpy as np

BLOCK = 512
FIELDS = 12  # of a line: extension, offset, size and name of the image, the label and the JSON
OFFSETS, SIZES = slice(1, FIELDS, 4), slice(2, FIELDS, 4)
MAX_DIGITS = 15  # of a number: fits 64 bits
MAX_LABEL_BYTES = 64
MAX_JSON_BYTES = 2**24
MAX_INDEX_LINE = 1024  # bytes: four names of 100 and six numbers are fewer
SEEN = bytes(range(33, 127)) + b" \n"
VERSION = "v1.2"


@dataclasses.dataclass(frozen=True)
class IndexColumns:
    """All lines of an index at once. Arrays of (samples, FIELDS) or, of image, label and JSON, (samples, 3).

    Attributes:
        text: (bytes,) uint8, the lines.
        starts, stops: where each field stands in ``text``.
        offsets, sizes: int64 bytes in the tar.
    """

    text: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def check_index(index: bytes, num_samples: int, tar_bytes: int) -> IndexColumns:
    """Checks all lines of an index.

    Args:
        index: its content.
        num_samples: of its tar.
        tar_bytes: size of the tar.

    Returns:
        What it says.

    Raises:
        ValueError: what is wrong, in words that follow the file's name.
    """
    first, _, body = index.partition(b"\n")
    if first != f"{VERSION} {num_samples}".encode():
        found = first[:40].decode("ascii", "backslashreplace")
        raise ValueError(f"begins {found!r}, expected '{VERSION} {num_samples}'")
    if body.translate(None, SEEN):
        raise ValueError("has characters that prepare never writes")
    data = np.frombuffer(body, np.uint8)
    ends = np.flatnonzero(data <= ord(" "))
    if len(ends) != FIELDS * num_samples or not body.endswith(b"\n"):
        raise ValueError(f"has {len(ends):,} fields, expected {FIELDS} for each of {num_samples:,} samples")
    is_line_end = (data[ends] == ord("\n")).reshape(num_samples, FIELDS)
    if is_line_end[:, :-1].any() or not is_line_end[:, -1].all():
        raise ValueError(f"has a line that has not {FIELDS} fields")
    stops = ends.reshape(num_samples, FIELDS)
    starts = np.concatenate([[0], ends[:-1] + 1]).reshape(num_samples, FIELDS)
    offsets = _numbers(data, starts[:, OFFSETS], stops[:, OFFSETS])
    sizes = _numbers(data, starts[:, SIZES], stops[:, SIZES])
    _check_places(offsets, sizes, tar_bytes)
    return IndexColumns(data, starts, stops, offsets, sizes)


def _numbers(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The whole numbers that stand at these places, int64 of the places' shape."""
    lengths = ends - starts
    longest = int(lengths.max(initial=1))
    if longest > MAX_DIGITS or int(lengths.min(initial=1)) < 1:
        raise ValueError(f"has an offset or a size that is no number of 1 to {MAX_DIGITS} digits")
    values = np.zeros(starts.shape, np.int64)
    for digit in range(longest):
        here = digit < lengths
        found = data[np.minimum(starts + digit, ends)].astype(np.int64) - ord("0")
        if ((found < 0) | (found > 9))[here].any():
            raise ValueError("has an offset or a size that is no number")
        values = np.where(here, values * 10 + found, values)
    return values


def _check_places(offsets: np.ndarray, sizes: np.ndarray, tar_bytes: int) -> None:
    """Checks that the files lie one behind the other, all of them in the tar: (samples, 3) each."""
    begin, size = offsets.reshape(-1), sizes.reshape(-1)
    follow = begin + size + (-size % BLOCK) + BLOCK  # where the next one's bytes begin, behind its header
    wrong = np.flatnonzero(begin != np.concatenate([[BLOCK], follow[:-1]]))
    if len(wrong):
        raise ValueError(
            f"says that sample {wrong[0] // 3:,} begins at byte {begin[wrong[0]]:,}, which is not where the one before "
            "it ends"
        )
    if len(begin) and int(begin[-1] + size[-1]) > tar_bytes:
        raise ValueError(f"claims {int(begin[-1] + size[-1]):,} bytes, and the tar has {tar_bytes:,}")
    if (sizes[:, 1] > MAX_LABEL_BYTES).any() or (sizes[:, 2] > MAX_JSON_BYTES).any():
        raise ValueError("claims a label or a description of a size that none has")
