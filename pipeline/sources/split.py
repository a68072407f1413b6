"""How people name splits; a shuffled order and a stratified split, both decided by the seed alone.

The order comes from a hash written out here, not from a library's generator, so a seed means the same order for ever.
"""

import re
import zlib
from collections.abc import Iterable

import numpy as np

SPLIT_FOLDERS = {  # in any case
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
WORDS = "|".join(sorted(SPLIT_FOLDERS, key=len, reverse=True))
SPLIT_WORD = re.compile(rf"(?<![a-z])({WORDS})(?![a-z])")
WORD_START = re.compile(rf"(?<![a-z])({WORDS})")
HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def split_of(folder: str) -> str | None:
    """The split that a folder of this name is: ``val`` for ``Validation``; None for another name."""
    return SPLIT_FOLDERS.get(folder.lower())


def apart_by_split(names: Iterable[str]) -> list[str]:
    """The first names that differ in a split's word alone, numbers aside: ``train2017`` and ``val2017``; else none."""
    alike: dict[str, dict[str, str]] = {}
    for name in names:
        words = re.sub(r"\d+", "0", HUMP.sub(" ", name).lower())
        for found in WORD_START.finditer(words):
            rest = f"{words[: found.start()]}*{words[found.end() :]}"
            alike.setdefault(rest, {}).setdefault(SPLIT_FOLDERS[found.group(1)], name)
    return next((list(group.values()) for group in alike.values() if len(group) > 1), [])


def shuffled(count: int, seed: int, purpose: str) -> np.ndarray:
    """A permutation of ``range(count)``, (count,) int64, decided by ``seed`` and ``purpose`` alone."""
    state = np.array([(seed * 0x9E3779B97F4A7C15 + zlib.crc32(purpose.encode())) % 2**64], np.uint64)
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) + _mix(state)), kind="stable")


def stratified(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Chooses about ``fraction`` of every class, at least one image of it staying out; (N,) bool, True = chosen.

    Of classes so small that their share rounds to nothing, some give one image, so that together they give theirs: of
    twenty classes of five images, a tenth is ten images of ten classes.
    """
    order = shuffled(len(labels), seed, "stratified split")
    rank_of = np.empty(len(labels), np.int64)
    rank_of[order] = np.arange(len(labels))
    by_class = np.lexsort((rank_of, labels))  # class by class, shuffled inside
    chosen = np.zeros(len(labels), bool)
    starts = np.flatnonzero(np.r_[True, np.diff(labels[by_class]) != 0]) if len(labels) else np.zeros(0, int)
    sizes = np.diff(np.r_[starts, len(labels)])
    takes = np.rint(sizes * fraction).astype(np.int64)
    small = np.flatnonzero((takes == 0) & (sizes > 1))
    small = small[shuffled(len(small), seed, "small classes")]
    takes[small] = np.diff(np.floor(np.cumsum(sizes[small] * fraction) + 0.5), prepend=0)
    for start, size, take in zip(starts, sizes, takes, strict=True):
        chosen[by_class[start : start + min(take, size - 1)]] = True
    return chosen


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 (Steele, Lea, Flood 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
