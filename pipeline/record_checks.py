"""What a manifest and the records of a data set begun may say, whoever wrote them: each value of its kind and range.

Every name is of the one known form. A sha256 is of no help here: who makes a data set makes that too. Names become
paths, numbers become memory.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from pipeline.errors import DatasetError
from twotower.words import shortened

MANIFEST_NAME = "manifest.json"
STATISTICS_NAME = "statistics.npz"
INFO_NAME = "_info.json"
QUARANTINE_NAME = "quarantine.jsonl"

SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,31}")
SHARD_NAME = re.compile(r"(?P<folder>[a-z0-9_]+)/(?P<split>[a-z0-9_]+)-[0-9]{6,9}\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_COUNT = 2**40  # samples, files, images
MAX_BYTES = 2**50
MAX_SHARD_SAMPLES = 10_000_000  # as --shard-size has it
MAX_SIDE_PX = 2**24
MAX_IMAGE_BYTES = 2**31 - 1  # uint8 of one image: DALI's own limit
MAX_TEXT = 2**16  # of a class's names, or of a reason

Check = tuple[Callable[[Any], bool], str]


def _is_list(value: Any, length: int) -> bool:
    return type(value) is list and len(value) == length


def _are_whole(values: list[Any], high: int) -> bool:
    return all(type(value) is int and 0 <= value <= high for value in values)


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number, {low:,} to {high:,}"


def _optional(check: Check) -> Check:
    holds, words = check
    return lambda value: value is None or holds(value), f"{words}, or null"


def _one_of(*values: object) -> Check:
    return (
        lambda value: any(value == one and type(value) is type(one) for one in values),
        f"one of {', '.join(map(str, values))}",
    )


TEXT: Check = (lambda value: type(value) is str and len(value) <= MAX_TEXT, "a text")
COUNT = _whole(0, MAX_COUNT)
SIZE = _whole(0, MAX_BYTES)
HASH: Check = (lambda value: type(value) is str and SHA256.fullmatch(value) is not None, "64 hexadecimal digits")
SIDE = _optional(_whole(1, MAX_SIDE_PX))
LIST: Check = (lambda value: type(value) is list, "a list")
TABLE: Check = (lambda value: type(value) is dict, "a table")

WHOLE = {
    "format": COUNT,
    "source": TEXT,
    "settings": TABLE,
    "picture": TABLE,
    "classes": LIST,
    "label_order": TEXT,
    "splits": TABLE,
    "files": TABLE,
    "num_found": COUNT,
    "passed_over": LIST,
    "dropped_splits": TABLE,
    "sha256": HASH,
}
IMAGE = {
    "encoding": _one_of("jpeg", "png", "raw", "original"),
    "channels": _one_of(1, 3),
    "height_px": SIDE,
    "width_px": SIDE,
}
SETTINGS = {  # those that a reader of images goes by; the others are only compared
    "resize_px": _optional(_whole(1, 4096)),
    "quality": _optional(_whole(1, 100)),
    "max_pixels": _whole(1, MAX_BYTES),
    "max_bytes": _whole(1, MAX_BYTES),
}
CLASS = {"name": TEXT, "title": TEXT}
SPLIT = {"num_samples": COUNT, "num_quarantined": COUNT, "shards": LIST}
SHARD_NUMBERS = {
    "num_samples": _whole(1, MAX_SHARD_SAMPLES),
    "size_bytes": SIZE,
    "sha256": HASH,
    "index_size_bytes": SIZE,
    "index_sha256": HASH,
}
SHARD_FIELDS = SHARD_NUMBERS | {"name": TEXT}
FILE = {"size_bytes": SIZE, "sha256": HASH}
PASSED_OVER = {"split": TEXT, "reason": TEXT, "count": COUNT, "examples": LIST}
PLAN = {"settings": TABLE, "totals": TABLE}
RESULT = {
    "shard": TABLE,
    "split": (lambda value: type(value) is str and SPLIT_NAME.fullmatch(value) is not None, "the name of a split"),
    "num_planned": _whole(1, MAX_SHARD_SAMPLES),
    "quarantine": LIST,
    "size_px": _optional((lambda value: _is_list(value, 2) and _are_whole(value, MAX_SIDE_PX), "two sides")),
    "totals": TABLE,
    "positions_sha256": _optional(HASH),
}
QUARANTINE = dict.fromkeys(("split", "source", "class", "action", "reason"), TEXT)
TOTALS = {
    "num_images": _whole(0, MAX_SHARD_SAMPLES),
    "num_pixels": SIZE,
    "channel_sum": LIST,
    "product_sum": LIST,
    "shape": _optional((lambda value: _is_list(value, 3) and _are_whole(value, MAX_SIDE_PX), "two sides and channels")),
}
MAX_SUM = 2**80  # of products of pixels
FILES = (STATISTICS_NAME, INFO_NAME, QUARANTINE_NAME)


def check_manifest(raw: Any) -> None:
    """Checks what the JSON of a manifest says, before anything is made of it.

    Raises:
        DatasetError: names the field, its value and what was expected.
    """
    if type(raw) is not dict:
        _refuse("all of it", raw, "a table")
    _check(raw, WHOLE, "")
    image = raw["picture"]
    _check(image, IMAGE, "picture.")
    height, width = image["height_px"], image["width_px"]
    if (height is None) != (width is None) or (height or 0) * (width or 0) * image["channels"] > MAX_IMAGE_BYTES:
        _refuse("picture", f"{width}x{height}", f"two sides, or none, and at most {MAX_IMAGE_BYTES:,} bytes of pixels")
    if image["encoding"] == "raw" and height is None and raw["splits"]:
        _refuse("picture", "raw images of several sizes", "one size")
    known = {name: check for name, check in SETTINGS.items() if name in raw["settings"]}
    _check(raw["settings"], known, "settings.", only=False)
    _check_rows(raw["classes"], CLASS, "classes")
    _check_rows(raw["passed_over"], PASSED_OVER, "passed_over")
    for number, row in enumerate(raw["passed_over"]):
        _check_each(row["examples"], TEXT, f"passed_over[{number}].examples")
    for name, record in raw["files"].items():
        _name(name in FILES, "files", name, f"one of {', '.join(FILES)}")
        _check_rows([record], FILE, f"files.{name}")
    for name, count in raw["dropped_splits"].items():
        _name(SPLIT_NAME.fullmatch(name), "dropped_splits", name, "train, val, test or another such word")
        _check_each([count], COUNT, f"dropped_splits.{name}")
    for name, split in raw["splits"].items():
        _name(SPLIT_NAME.fullmatch(name), "splits", name, "train, val, test or another such word")
        _check_split(name, split)


def _check_split(name: str, split: Any) -> None:
    where = f"splits.{name}"
    _check_rows([split], SPLIT, where)
    seen = set[str]()
    for number, shard in enumerate(split["shards"]):
        _check_shard(shard, name, f"{where}.shards", number)
        if shard["name"] in seen:
            _refuse(f"{where}.shards[{number}].name", shard["name"], "each shard once")
        seen.add(shard["name"])
    total = sum(shard["num_samples"] for shard in split["shards"])
    if total != split["num_samples"] or not total:
        _refuse(f"{where}.num_samples", split["num_samples"], f"the {total:,} samples of its shards, and at least one")


def _check_shard(shard: Any, split: str, where: str, number: int) -> None:
    if type(shard) is not dict:
        _refuse(f"{where}[{number}]", shard, "a table")
    name = shard.get("name")
    found = SHARD_NAME.fullmatch(name) if type(name) is str else None
    if found is None or not found["folder"] == found["split"] == split:
        _refuse(_place(where, number, "name"), name, f"{split}/{split}-000000.tar, or another number")
    _check(shard, SHARD_FIELDS, where, number)


def check_plan(raw: Any) -> None:
    """The same for the record of a run of prepare.

    Raises:
        DatasetError: as :func:`check_manifest`.
    """
    _check_rows([raw], PLAN, "plan")
    for name, count in raw["totals"].items():
        _name(SPLIT_NAME.fullmatch(name), "totals", name, "the name of a split")
        _check_each([count], COUNT, f"totals.{name}")


def check_result(raw: Any) -> None:
    """The same for the record of a shard that is made.

    Raises:
        DatasetError: as :func:`check_manifest`.
    """
    _check_rows([raw], RESULT, "result")
    empty = raw["shard"].get("num_samples") == 0 and type(raw["shard"]["num_samples"]) is int
    _check_shard(raw["shard"] | ({"num_samples": 1} if empty else {}), raw["split"], "shard", 0)
    _check_rows(raw["quarantine"], QUARANTINE, "quarantine")
    totals = raw["totals"]
    _check_rows([totals], TOTALS, "totals")
    channels, products = totals["channel_sum"], totals["product_sum"]
    sums: list[Any] = [channels, *products] if _is_list(products, len(channels)) else [None]
    if not all(_is_list(row, len(channels)) and _are_whole(row, MAX_SUM) for row in sums) or len(channels) > 4:
        _refuse("totals", sums, "sums of each channel, and of the products of each pair")
    if raw["split"] == "train" and totals["num_images"] != raw["shard"]["num_samples"]:
        _refuse("totals.num_images", totals["num_images"], "the samples of the shard")
    if totals["num_pixels"] < totals["num_images"] or raw["num_planned"] < raw["shard"]["num_samples"]:
        _refuse("totals.num_pixels", totals["num_pixels"], "one for each image, and no more images than planned")


def check_quarantine(row: Any) -> None:
    """The same for a line of quarantine.jsonl.

    Raises:
        DatasetError: as :func:`check_manifest`.
    """
    _check_rows([row], QUARANTINE, "quarantine")


def _check_rows(rows: list[Any], fields: dict[str, Check], where: str) -> None:
    for number, row in enumerate(rows):
        if type(row) is not dict:
            _refuse(f"{where}[{number}]", row, "a table")
        _check(row, fields, where, number)


def _check_each(values: Iterable[Any], check: Check, where: str) -> None:
    for value in values:
        if not check[0](value):
            _refuse(where, value, check[1])


def _check(row: dict[str, Any], fields: dict[str, Check], where: str, number: int = -1, *, only: bool = True) -> None:
    """Checks the fields of a table; with ``only``, that there are no others. Words are made where one is refused."""
    for name, (holds, words) in fields.items():
        if name not in row:
            _refuse(_place(where, number, name), "missing", words)
        if not holds(row[name]):
            _refuse(_place(where, number, name), row[name], words)
    if only and len(row) != len(fields):
        other = next(name for name in row if name not in fields)
        _refuse(_place(where, number, shortened(other)), "there", f"only {', '.join(fields)}")


def _place(where: str, number: int, name: str) -> str:
    return f"{where}[{number}].{name}" if number >= 0 else f"{where}{name}"


def _name(holds: object, where: str, name: str, expected: str) -> None:
    if not holds:
        _refuse(where, name, expected)


def _refuse(field: str, value: object, expected: str) -> NoReturn:
    raise DatasetError(f"{MANIFEST_NAME}: {field} is {shortened(value)}: expected {expected}")
