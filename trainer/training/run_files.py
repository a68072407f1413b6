"""Reading a run that may have come from elsewhere: files inside its folder, and values that are what they are to be.

Nobody signs a run. What one says of itself is read as a stranger's word: no link is followed, nothing is read without
end, and a field of another type or range is as if it were not there, or the file is called damaged.
"""

import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from twotower.untrusted import parse_json, read_regular

MOST_RECORD_BYTES = 64 << 20  # of result.json, environment.json, checkpoint.json (which may name skipped samples)
MOST_TEXT = 20_000  # characters; a command of many overrides has a thousand
MOST_LEDGER = 1000  # rows; a step has thirty
WAYS = ("a->b", "b->a", "a->a", "b->b")
FOLDERS = ("trained_on", "checkpoints", ".start", "tensorboard", "loggers", "profile")
Check = Callable[[Any], bool]


def check_inside(run: Path, names: frozenset[str]) -> None:
    """Refuses a run of whose own files one is a link, a pipe or a device: it would be read or written elsewhere.

    The run folder itself may be a link.

    Args:
        run: run folder.
        names: what a run writes.

    Raises:
        RunError: naming the file.
    """
    for name in sorted(names):
        _check_kind(run / name, folder=name in FOLDERS)
    for name in ("trained_on", ".start", "loggers"):
        if (run / name).is_dir():
            for path in (run / name).iterdir():
                _check_kind(path, folder=path.is_dir())


def _check_kind(path: Path, *, folder: bool) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:  # there is none, or it cannot be seen: whoever reads it says so
        return
    if stat.S_ISLNK(mode):
        raise RunError(
            f"{path} is a link, and a run's own files lie in its folder: one from elsewhere may lead anywhere; put "
            "the file or folder itself there (the run folder may be a link)"
        )
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise RunError(f"{path} is not a {'folder' if folder else 'file'}: this is no run, or not a whole one")


def parse_object(path: Path) -> dict[str, Any]:
    """A JSON object of a run.

    Raises:
        OSError: it cannot be read, or is no file of a run.
        ValueError: it is none.
    """
    found = parse_json(read_regular(path, MOST_RECORD_BYTES, follow=False), nan=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, expected a JSON object")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a run; {} where there is none, or it is damaged: for what decides nothing."""
    try:
        return parse_object(path)
    except (OSError, ValueError):
        return {}


def is_count(value: Any) -> bool:
    """A whole number from 0 that anything can have counted."""
    return type(value) is int and 0 <= value < 1 << 53


def is_number(value: Any) -> bool:
    """A number, finite and no larger than anything measures."""
    return type(value) in (int, float) and abs(value) <= 1e100


def is_share(value: Any) -> bool:
    """0..1."""
    return is_number(value) and 0 <= value <= 1


def is_text(value: Any) -> bool:
    """A text that somebody may read."""
    return isinstance(value, str) and len(value) <= MOST_TEXT


def is_by_tower(value: Any) -> bool:
    """``{tower: number}``."""
    return isinstance(value, dict) and all(tower in ("a", "b") and is_number(each) for tower, each in value.items())


def is_ledger(value: Any) -> bool:
    """Rows of a ledger, see :class:`trainer.parallel.link.LedgerRow`."""
    return isinstance(value, list) and len(value) <= MOST_LEDGER and all(map(_is_ledger_row, value))


def _is_ledger_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(is_text(row.get(name)) for name in ("kind", "name", "phase"))
        and row.get("direction") in WAYS
        and all(is_count(row.get(name)) for name in ("calls", "bytes"))
    )


RESULT: Mapping[str, Check] = {
    **dict.fromkeys(("exit_reason", "reason"), is_text),
    **dict.fromkeys(("step", "num_samples", "processes", "batch_size"), is_count),
    **dict.fromkeys(("epoch", "elapsed_s", "images_per_s"), is_number),
    **dict.fromkeys(("top1", "top5"), is_share),
    "ledger": is_ledger,
}
STEP_ROW: Mapping[str, Check] = {
    **dict.fromkeys(("step", "epoch"), is_count),
    **dict.fromkeys(("loss", "learning_rate", "images_per_s", "elapsed_s"), is_number),
    **dict.fromkeys(("data_wait_share", "queue_ready_share"), is_number),
    "gradient_norm": is_by_tower,
}
EVALUATION_ROW: Mapping[str, Check] = {
    **dict.fromkeys(("step", "num_samples"), is_count),
    **dict.fromkeys(("epoch", "loss", "elapsed_s"), is_number),
    **dict.fromkeys(("top1", "top5"), is_share),
    **dict.fromkeys(("split", "views"), is_text),
}
LEDGER_ROW: Mapping[str, Check] = {"step": is_count, "rows": is_ledger}
ROWS = {  # of metrics.jsonl, by kind: what a row must have, and what each field is
    "step": (("step", "epoch", "loss"), STEP_ROW),
    "evaluation": (("step", "epoch", "loss", "top1", "num_samples"), EVALUATION_ROW),
    "ledger": (("step", "rows"), LEDGER_ROW),
}
_PART: Mapping[str, Check] = {
    **dict.fromkeys(("command", "commit", "python", "torch", "system", "processor", "kernels", "started"), is_text),
    **dict.fromkeys(("data", "device", "skip_list"), is_text),
    **dict.fromkeys(("cores", "step", "processes", "replicas"), is_count),
    "elapsed_s": is_number,
    "gpus": lambda value: isinstance(value, list) and len(value) <= MOST_LEDGER and all(map(is_text, value)),
    "changed": lambda value: (
        isinstance(value, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in value.values())
    ),
}


def wrong_field(found: Mapping[str, Any], checks: Mapping[str, Check]) -> str:
    """The first field that is not what it is to be; null is as if it were not there. Empty where all are right."""
    return next((name for name, check in checks.items() if found.get(name) is not None and not check(found[name])), "")


def is_row(row: Any) -> bool:
    """Whether this is a row of metrics.jsonl of which every field is what it is to be."""
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or row["kind"] not in ROWS:
        return False
    needed, checks = ROWS[row["kind"]]
    return all(row.get(name) is not None for name in needed) and not wrong_field(row, checks)


def sound_environment(found: Mapping[str, Any]) -> dict[str, Any]:
    """environment.json without fields that are not what they are to be; of unknown ones, those that can be shown."""
    sound = _sound_part(found)
    parts = found.get("resumed")
    sound.pop("resumed", None)
    if isinstance(parts, list):
        sound["resumed"] = [_sound_part(part) for part in parts if isinstance(part, dict)]
    return sound


def _sound_part(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if is_text(name) and _PART.get(name, _is_plain)(value)}


def _is_plain(value: Any) -> bool:
    return is_number(value) or is_text(value) or isinstance(value, bool)
