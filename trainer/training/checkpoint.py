"""Checkpoints: one safetensors file per tower, complete or invisible.

``RUN/checkpoints/step-00000110/`` holds ``tower-a.safetensors``, ``tower-b.safetensors`` (weights as ``conv1.weight``,
velocities as ``velocity/conv1.weight``, the statistics of a batch normalization as
``post1.batch_norm.running_mean``) and
``checkpoint.json`` (step, loader state, sizes and sha256 of the others), which is written last into a folder that gets
its name only then. Names do not say how many processes wrote them: one process, two and several pairs read
each other's.

One that is damaged is passed over by readers and set aside by the next training, as ``.damaged-step-00000110``; of
those the newest :data:`KEPT_DAMAGED` stay to be looked at. One that cannot be read (another user's, a failing disk) is
not damaged: everybody says so and stops.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.manifest import sync_folder, write_atomic
from trainer.config import Config
from trainer.errors import CheckpointError, DamagedError
from trainer.training.run_files import is_count, is_share, parse_object
from twotower.terminal import warn
from twotower.typed import build
from twotower.untrusted import open_regular
from twotower.words import listed, shortened

if TYPE_CHECKING:  # whoever only looks for a checkpoint needs no torch, which takes a second to import
    from torch import Tensor

    from trainer.model.alexnet import AlexNet
    from trainer.training.optimizer import PaperSGD

RECORD = "checkpoint.json"
CHECKPOINTS_NAME = "checkpoints"
KEPT_DAMAGED = 2
_NAME = re.compile(r"step-[0-9]{8,15}")
_FILE_SETS = ({"tower-a.safetensors"}, {"tower-a.safetensors", "tower-b.safetensors"})
MOST_TOWER_BYTES = 1 << 36  # of one file; the paper's has 0.25 GB


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """What ``checkpoint.json`` says.

    Attributes:
        step: finished updates.
        config: the recipe that its steps were made with, as TOML text: RUN/config.toml may have been edited since.
        loader: state of the training loader after the last batch of that step; None before the first.
        files: ``{name: {"size_bytes": int, "sha256": hex}}`` of the tower files.
        top1: share of held-out images right with these very weights, 0..1; None where they were not evaluated.
    """

    step: int
    config: str
    loader: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    top1: float | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """A checkpoint to use.

    Attributes:
        folder: where it is.
        record: what it says of itself, checked.
        passed_over: newer ones that are damaged.
    """

    folder: Path
    record: CheckpointRecord
    passed_over: tuple[Path, ...] = ()


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / CHECKPOINTS_NAME / f"step-{step:08d}"


def snapshot(net: "AlexNet", optimizer: "PaperSGD") -> "dict[str, dict[str, Tensor]]":
    """A copy of the towers that this process holds, as they are written: ``{tower: {name: tensor on the CPU}}``."""
    import torch

    return {
        tower: {name: part.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, part in parts.items()}
        for tower, parts in net.split_towers(_tensors(net, optimizer)).items()
    }


def _tensors(net: "AlexNet", optimizer: "PaperSGD | None") -> "dict[str, Tensor]":
    """Weights and running statistics, and the velocities where an optimizer is given; not copies."""
    tensors: dict[str, Tensor] = dict(net.state_dict())
    if optimizer is not None:
        tensors |= {f"velocity/{name}": optimizer.velocity(weight) for name, weight in net.named_parameters()}
    return tensors


def write_towers(folder: Path, towers: "Mapping[str, dict[str, Tensor]]") -> None:
    """Writes a :func:`snapshot` into an unfinished folder (see :func:`unfinished`)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in towers.items():
        path = folder / f"tower-{name}.safetensors"
        path.touch()
        mode = path.stat().st_mode & 0o777  # as umask and folder want it; safetensors writes 0600
        save_file(tensors, path)
        path.chmod(mode)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def save_towers(folder: Path, net: "AlexNet", optimizer: "PaperSGD") -> None:
    """Writes the towers that this process holds into an unfinished folder."""
    write_towers(folder, snapshot(net, optimizer))


def unfinished(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete; a leading dot keeps it out of every listing."""
    return run / CHECKPOINTS_NAME / f".step-{step:08d}.unfinished"


def commit(
    run: Path,
    step: int,
    *,
    config: str,
    loader: dict[str, Any] | None,
    towers: Sequence[str],
    top1: float | None = None,
) -> Path:
    """Makes a checkpoint visible, once every tower's file is in its unfinished folder. Called by one rank.

    Returns:
        The checkpoint's folder.
    """
    folder, final = unfinished(run, step), folder_of(run, step)
    files = {name: _facts(folder / name) for name in (f"tower-{tower}.safetensors" for tower in towers)}
    record = CheckpointRecord(step=step, config=config, loader=loader, files=files, top1=top1)
    write_atomic(folder / RECORD, (json.dumps(dataclasses.asdict(record), indent=1) + "\n").encode())
    if final.exists():  # never half removed under its name
        _move_aside(final)
    folder.replace(final)
    sync_folder(final.parent)
    return final


def rate(folder: Path, top1: float) -> None:
    """Notes the accuracy of a checkpoint that was saved before it was evaluated."""
    record = dataclasses.replace(read_record(folder), top1=top1)
    write_atomic(folder / RECORD, (json.dumps(dataclasses.asdict(record), indent=1) + "\n").encode())


def checkpoints(run: Path) -> list[Path]:
    """Folders of the checkpoints of a run, oldest first; unchecked, and a damaged one is among them.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    folder = run / CHECKPOINTS_NAME
    try:
        names = [path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from None
    return [folder / name for name in sorted(names, key=_step_of)]


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = checkpoints(run)
    return found[-1] if found else None


def rotate(run: Path, written: Path, count: int) -> None:
    """Removes old checkpoints, and what unfinished ones left behind.

    What was just written stays, whatever step the others are of; besides it the newest ``count - 1``, and the best.
    """
    others = [path for path in checkpoints(run) if path != written]
    try:
        best = _best(run)
    except CheckpointError:
        return  # one cannot be read now, and may be the best
    older = others[: max(0, len(others) - (count - 1))]
    for path in (path for path in older if path != best):  # whoever reads it finds it whole or not at all
        with contextlib.suppress(OSError):
            path.replace(path.with_name(f".{path.name}.old.unfinished"))
    for path in list((run / CHECKPOINTS_NAME).glob(".step-*.unfinished")):
        _remove(path)


def set_aside(run: Path, names: Sequence[str]) -> None:
    """Moves damaged checkpoints to names that nobody reads, and keeps the newest :data:`KEPT_DAMAGED` of such."""
    for name in names:
        if os.path.lexists(run / CHECKPOINTS_NAME / name):
            _move_aside(run / CHECKPOINTS_NAME / name)
    damaged = sorted((run / CHECKPOINTS_NAME).glob(".damaged-step-*"))
    for path in damaged[: max(0, len(damaged) - KEPT_DAMAGED)]:
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a checkpoint, as far as that is possible; of one that is no folder, the file or link."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _move_aside(folder: Path) -> None:
    aside = folder.with_name(f".damaged-{folder.name}")
    _remove(aside)
    folder.replace(aside)


def _best(run: Path) -> Path | None:
    """The checkpoint with the highest top-1, the newest of equals; None where none was evaluated."""
    rated = [(top1, path) for path in checkpoints(run) if (top1 := _top1(path)) is not None]
    return max(rated)[1] if rated else None


def _top1(folder: Path) -> float | None:
    """What a checkpoint's record says about its accuracy, without checking the files beside it.

    Raises:
        CheckpointError: the record is there and cannot be read.
    """
    try:
        top1 = parse_object(folder / RECORD).get("top1")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:  # no file: a damaged one
            return None
        raise CheckpointError(f"{folder / RECORD} cannot be read: {error.strerror or error}") from None
    return top1 if isinstance(top1, float) and is_share(top1) else None


def choose(run: Path, which: str = "newest", *, quiet: bool = False) -> Choice | None:
    """Finds and checks the checkpoint to use; changes nothing.

    Args:
        run: run folder.
        which: ``newest``: the newest complete one; a damaged one is passed over, said aloud. ``best``: the one with the
            highest top-1 on the held-out split. Otherwise the number of its step.
        quiet: do not say which were passed over.

    Returns:
        The checkpoint; None where a run has none yet.

    Raises:
        CheckpointError: every one is damaged, or the one asked for is, or it does not exist; or one cannot be read.
    """
    found = checkpoints(run)
    if which != "newest":
        folder = _best(run) if which == "best" else _of_step(found, which)
        if folder is None:
            have = listed([_step_of(path.name) for path in found]) or "none"
            reason = "no checkpoint has been evaluated" if which == "best" else f"it has checkpoints of steps {have}"
            raise CheckpointError(f"--checkpoint {which}: {reason} in {run}; newest is always there after a save")
        return Choice(folder, read_record(folder))
    damaged: list[Path] = []
    for folder in reversed(found):
        try:
            return Choice(folder, read_record(folder), tuple(damaged))
        except DamagedError as error:
            if not os.path.lexists(folder):  # a training that goes on has removed it meanwhile
                return choose(run, which, quiet=quiet)
            damaged.append(folder)
            if not quiet:
                warn(f"{error}; going back to the checkpoint before")
    if found:
        raise CheckpointError(
            f"no complete checkpoint in {run}: all of {listed([path.name for path in found])} are damaged; put back a "
            "copy of one, or train into another --run folder"
        )
    return None


def _of_step(found: Sequence[Path], text: str) -> Path | None:
    """The checkpoint of a step, given as a number or as its folder's name."""
    wanted = text.removeprefix("step-").lstrip("0") or "0"
    return next((path for path in found if str(_step_of(path.name)) == wanted), None)


def read_record(folder: Path) -> CheckpointRecord:
    """Reads and checks a checkpoint: every file there, of the right size and hash.

    Raises:
        DamagedError: naming the file that is missing, truncated or changed.
        CheckpointError: a file cannot be read, which says nothing about what is in it.
    """
    try:
        if folder.is_symlink():
            raise ValueError("its folder is a link")
        record = build(CheckpointRecord, parse_object(folder / RECORD))
        _check_record(record, folder)
        for name, expected in record.files.items():
            found = _facts(folder / name, expected["size_bytes"])
            if found != expected:
                raise DamagedError(f"{folder / name} is damaged: {_difference(found, expected)}")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedError(f"{folder} is damaged: it has no file {Path(error.filename).name}") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a link, a pipe, a device: no file of a checkpoint
            raise DamagedError(f"{error.filename or folder} is damaged: it {error.strerror}") from None
        raise CheckpointError(
            f"{error.filename or folder} cannot be read: {error.strerror or error}; make it readable, or move "
            f"{folder.name} away to use the one before"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / RECORD} is damaged ({type(error).__name__}: {error})") from None
    return record


def _check_record(record: CheckpointRecord, folder: Path) -> None:
    """Raises ValueError where a record is of another checkpoint, or says nothing of its files."""
    if folder.name != f"step-{record.step:08d}":
        raise ValueError(f"it is of step {record.step}")
    if record.files.keys() not in _FILE_SETS:
        raise ValueError(f"its files are {listed(record.files) or 'none'}")
    for name, facts in record.files.items():
        size, digest = facts.get("size_bytes"), facts.get("sha256")
        if not (is_count(size) and int(size or 0) <= MOST_TOWER_BYTES and re.fullmatch("[0-9a-f]{64}", str(digest))):
            raise ValueError(f"it says of {name} that it has {shortened(facts)}")
    if record.top1 is not None and not is_share(record.top1):
        raise ValueError(f"its top1 is {record.top1}")


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    size, wanted = found["size_bytes"], expected["size_bytes"]
    return "its content has changed" if size == wanted else f"it has {size} bytes instead of {wanted}"


def load_towers(folder: Path, net: "AlexNet", optimizer: "PaperSGD | None" = None) -> None:
    """Loads the towers that this process holds, and their velocities where an optimizer is given.

    Raises:
        CheckpointError: a file does not fit the net.
    """
    from safetensors import SafetensorError, safe_open

    for tower, parts in net.split_towers(_tensors(net, optimizer)).items():
        path = folder / f"tower-{tower}.safetensors"
        try:
            with open_regular(path, follow=False), safe_open(path, "pt") as tensors:
                _copy_tensors(tensors, parts, path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise DamagedError(f"{path} is damaged: {error}") from None


def _copy_tensors(tensors: Any, parts: "Mapping[str, Tensor]", path: Path) -> None:
    """Copies the tensors that a net has from an open file, and looks at each one's shape before it is read.

    Raises:
        CheckpointError: one is missing, of another shape, no floating-point number, or not finite.
    """
    import torch

    known = set(tensors.keys())
    for name, target in parts.items():
        found = tuple(tensors.get_slice(name).get_shape()) if name in known else "nothing"
        if found != tuple(target.shape):
            raise CheckpointError(f"{path}: {name} is {found}, and this recipe's net needs {tuple(target.shape)}")
        tensor = tensors.get_tensor(name)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} holds {tensor.dtype}, and a net's weights are floating-point numbers"
            )
        # A sum is finite where all are, and takes a quarter of the time; of large numbers it need not be.
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{path}: {name} has values that are no numbers (NaN) or infinite: use another checkpoint"
            )
        with torch.no_grad():
            target.copy_(tensor)


def check_holds(choice: Choice, config: Config) -> None:
    """Refuses a recipe whose net a checkpoint cannot hold, before memory is taken for that net.

    Raises:
        CheckpointError: it has more weights than the files have bytes for.
    """
    size = sum(facts["size_bytes"] for facts in choice.record.files.values())
    weights = config.model.count_weights()
    if 2 * weights > size:  # no format has less than two bytes
        raise CheckpointError(
            f"{choice.folder}: the recipe's net has {weights:,} weights, and the checkpoint {size:,} bytes: it is not "
            "of this recipe"
        )


def _facts(path: Path, expected_bytes: int | None = None) -> dict[str, Any]:
    """Size and sha256 of a file; one of another size than expected is not read."""
    with open_regular(path, follow=False) as handle:
        size = os.fstat(handle).st_size
        if expected_bytes not in (None, size):
            return {"size_bytes": size, "sha256": ""}
        try:
            with os.fdopen(os.dup(handle), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
    return {"size_bytes": size, "sha256": digest}
