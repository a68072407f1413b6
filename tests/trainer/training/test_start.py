"""How a run starts, goes on and is replaced: it changes only once its towers are ready; nothing blocks the next try."""

import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.loader.config import LoaderConfig
from tests.helpers.small_disk import small_disk
from tests.helpers.tiny_run import LAST, RECIPE, change_manifest, flip, make_tiny_run
from tests.helpers.training_commands import call
from tests.helpers.trees import tree
from trainer.config import Config, ModelConfig, OptimizerConfig, TrainConfig, load_config
from trainer.errors import RunError
from trainer.parallel import launch
from trainer.training import checkpoint, run_folder, start
from trainer.training.loop import Trainer
from trainer.training.resume import changes_of
from twotower.fields import MAY_CHANGE

MAY = {  # what a run may change on its way
    "data": {"threads", "prefetch", "mmap"},
    "model": set(),
    "optimizer": set(),
    "train": {
        "epochs",
        "evaluate_every_epochs",
        "evaluate_split",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "cuda_graph",
        "keep_checkpoints",
        "loggers",
        "threads",
        "peer_timeout_s",
        "start_timeout_s",
    },
}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run, to be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def back_to(run: Path, step: int) -> None:
    """As if it had been killed after this step."""
    for folder in checkpoint.checkpoints(run)[:]:
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (run / "result.json").unlink()


def environment(run: Path) -> dict[str, Any]:
    return json.loads((run / "environment.json").read_text())


def weights(run: Path, step: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted(checkpoint.folder_of(run, step).glob("tower-*"))]


# Which fields may change.


def test_each_field_says_whether_it_may_change() -> None:
    """Exactly these may: they touch no weight of the steps to come."""
    sections = {"data": LoaderConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
    found = {
        name: {field.name for field in dataclasses.fields(kind) if field.metadata.get(MAY_CHANGE)}
        for name, kind in sections.items()
    }
    assert found == MAY


def test_every_changed_field_is_found() -> None:
    """At any depth, by its name in the recipe."""
    before, sets = Config(), ("model.lrn.beta=0.5", "data.prefetch=3", "train.epochs=91", "optimizer.momentum=0.8")
    changes = changes_of(before, load_config(None, sets))
    assert {(change.name, change.before, change.after, change.may) for change in changes} == {
        ("model.lrn.beta", 0.75, 0.5, False),
        ("data.prefetch", 2, 3, True),
        ("train.epochs", 90, 91, True),
        ("optimizer.momentum", 0.9, 0.8, False),
    }
    assert changes_of(before, before) == ()


def test_evaluations_that_a_schedule_looks_at_stay(tmp_path: Path) -> None:
    """With plateau they decide the rates; drops placed by the number of epochs are said aloud, and may move."""
    from trainer.training.resume import allowed_changes, depends_on_epochs

    plateau, other = (
        load_config(None, ("optimizer.schedule=plateau", f"train.evaluate_every_epochs={n}")) for n in (1, 2)
    )
    with pytest.raises(RunError, match=r"train\.evaluate_every_epochs = 2 instead of .* looks at the evaluations"):
        allowed_changes(tmp_path, plateau, other)
    assert depends_on_epochs(Config()) == ""
    assert "log_thirds" in depends_on_epochs(load_config(None, ("optimizer.schedule=log_thirds",)))
    assert "halfway" in depends_on_epochs(load_config(None, ("optimizer.bias_schedule=halfway",)))


# Going on.


def test_resume_of_the_folder_alone(tiny_data: Path, run: Path, trainer: Call, tmp_path: Path) -> None:
    """Recipe and data set are the run's; what changes is recorded with the step; and the bits are those of one go."""
    undisturbed = weights(run, LAST)
    back_to(run, LAST - 1)
    code, said, errors = trainer("train", "--resume", run, "--set", "train.keep_checkpoints=4")
    assert code == 0, errors
    assert f"from step {LAST - 1}" in said and f"finished at step {LAST}" in said
    assert "train.keep_checkpoints = 4 instead of train.keep_checkpoints = 2" in errors
    assert weights(run, LAST) == undisturbed
    assert load_config(run / "config.toml").train.keep_checkpoints == 4
    found = environment(run)
    (later,) = found["resumed"]
    assert (later["step"], later["changed"]) == (LAST - 1, {"train.keep_checkpoints": [2, 4]})
    assert (later["data"], later["processes"], later["replicas"]) == (str(tiny_data), 1, 1)
    assert found["command"] != later["command"] and "--resume" in later["command"]
    assert not (run / run_folder.START_NAME).exists() and not (run / ".lock").exists()


def test_a_finished_run_stays_as_it_is(run: Path, tiny_data: Path, trainer: Call) -> None:
    """Exit code 0, not a byte changed, and the line says how to train longer; that command then does."""
    before = tree(run)
    for words in (("--resume", run), (*RECIPE, "--data", tiny_data, "--run", run, "--resume", "auto")):
        for more in ((), ("--dry-run",), ("--set", "train.threads=2")):
            code, said, errors = trainer("train", *words, *more)
            assert (code, errors) == (0, "")
            assert "stays as it is" in said and f"train --resume {run} --set train.epochs=3" in said
    assert tree(run) == before
    code, said, errors = trainer("train", "--resume", run, "--set", "train.epochs=3")
    assert code == 0 and "finished at step 9" in said, errors


def test_a_data_set_that_has_moved(tiny_data: Path, run: Path, trainer: Call, tmp_path: Path) -> None:
    """It is the same by its fingerprint, and the new place is noted; --resume alone finds it there from then on."""
    back_to(run, LAST - 1)
    moved = Path(shutil.copytree(tiny_data, tmp_path / "moved"))
    code, _, errors = trainer("train", "--resume", run, "--data", moved)
    assert code == 0 and f"has moved from {tiny_data} to {moved}" in errors, errors
    assert environment(run)["data"] == str(tiny_data)
    assert environment(run)["resumed"][-1]["data"] == str(moved)
    back_to(run, LAST - 1)
    assert "has moved" not in trainer("train", "--resume", run)[2]


def test_a_run_of_before_gets_what_it_lacks(run: Path, tiny_data: Path, trainer: Call, tmp_path: Path) -> None:
    """No copy of the classes, no options noted: the loader's state still knows the data set, and the copy is made."""
    back_to(run, LAST - 1)
    shutil.rmtree(run / run_folder.DATA_SET_NAME)
    old = environment(run)
    kept = {key: old[key] for key in ("command", "data")}
    (run / "environment.json").write_text(json.dumps(kept))
    other = change_manifest(tiny_data, tmp_path / "other", source="another")
    code, _, errors = trainer("train", "--resume", run, "--data", other)
    assert code == 2 and "is not the data set that" in errors
    assert trainer("train", "--resume", run)[0] == 0
    assert (run / run_folder.DATA_SET_NAME / "manifest.json").read_bytes() == (tiny_data / "manifest.json").read_bytes()


# Starts that fail.


def die(*_: object, **__: object) -> int:
    """Towers that end before their first step."""
    return 1


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume", "auto")], ids=["new", "overwrite", "resume"])
def test_towers_that_never_begin_change_nothing(
    run: Path, tiny_data: Path, trainer: Call, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], tmp_path: Path
) -> None:
    """Killed in start-up, say: a new run is not there, an old one is what it was, result.json included."""
    folder = run if more else tmp_path / "some" / "new"
    if "auto" in more:
        back_to(run, LAST - 1)
    monkeypatch.setattr(launch, "start_towers", die)
    before = tree(tmp_path)
    assert trainer("train", *RECIPE, "--data", tiny_data, "--run", folder, "--processes", 2, *more)[0] == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("more", [("--overwrite",), ("--resume", "auto")], ids=["overwrite", "resume"])
def test_an_error_in_this_process_before_the_first_step(
    run: Path, tiny_data: Path, trainer: Call, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """The net does not fit into memory, say."""
    back_to(run, LAST - 1)

    def fail(self: Trainer) -> None:
        raise RunError("no room for the net")

    monkeypatch.setattr(Trainer, "_check_consistency", fail)
    before = tree(run)
    code, _, errors = trainer("train", *RECIPE, "--data", tiny_data, "--run", run, *more)
    assert code == 2 and "no room for the net" in errors
    assert tree(run) == before


def killed_at(point: int, run: Path, words: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills a start at one of its file operations: what happened before stays, nothing is tidied up."""

    class Killed(BaseException):
        pass

    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count >= point:
                raise Killed
            return original(*arguments, **more)

        return operation

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(start, "discard_start", lambda run: False)  # nobody is there to do it
        with pytest.raises(Killed):
            call(monkeypatch, *words)


@pytest.mark.parametrize("replaced", [False, True], ids=["new", "overwrite"])
@pytest.mark.slow
def test_a_start_killed_at_any_file_blocks_nothing(
    tiny_data: Path, tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """At every operation on the folder up to the first step: the old run is whole, or the next start finds no run."""
    whole = tree(tiny_run)
    for point in range(1, 60):
        run = tmp_path / f"run{point}"
        if replaced:
            shutil.copytree(tiny_run, run, copy_function=os.link)  # no file is written in place
        words = ["train", *RECIPE, "--data", tiny_data, "--run", run, *(["--overwrite"] if replaced else [])]

        class Begun(Exception):
            pass

        def begin(*_: object, **__: object) -> None:
            raise Begun

        monkeypatch.setattr(Trainer, "__init__", lambda self, *_, run=run, **__: start.commit_start(run) or begin())
        try:
            killed_at(point, run, words, monkeypatch)
        except Begun:
            assert point > 5
            return
        if run.exists() and run_folder.is_begun(run):
            now = tree(run)
            assert {name: now[name] for name in whole} == whole, point
        shutil.rmtree(run, ignore_errors=True)
    pytest.fail("the start has more operations than were tried")


def test_the_next_start_after_a_killed_one(tiny_data: Path, tmp_path: Path, trainer: Call) -> None:
    """A lock, a prepared start and half a file are left: the same command works, without --overwrite."""
    run = tmp_path / "run"
    (run / run_folder.START_NAME).mkdir(parents=True)
    (run / run_folder.START_NAME / "config.toml").write_text("half a fi")
    (run / ".lock").write_text("{")
    (run / ".environment.json.0123456789abcdef.tmp").write_text("x")
    code, _, errors = trainer("train", *RECIPE, "--data", tiny_data, "--run", run)
    assert code == 0, errors
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


# Replacing.


def fill(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "report.html").write_text("of the old run")


def test_overwrite_removes_a_run_and_nothing_else(run: Path, tiny_data: Path, trainer: Call) -> None:
    """Old checkpoints and figures go; files of others stay."""
    fill(run)
    inode = run.stat().st_ino
    code, said, _ = trainer(
        "train", *RECIPE, "--set", "train.epochs=1", "--data", tiny_data, "--run", run, "--overwrite"
    )
    assert code == 0 and "from the start" in said
    assert [folder.name for folder in checkpoint.checkpoints(run)][-1] == "step-00000003"
    assert (run / "notes.txt").read_text() == "mine" and not (run / "report.html").exists()
    assert "resumed" not in environment(run) and run.stat().st_ino == inode


def test_overwrite_empties_what_a_link_points_to(run: Path, tiny_data: Path, trainer: Call, tmp_path: Path) -> None:
    """A link to the run stays."""
    link = tmp_path / "latest"
    link.symlink_to(run)
    words = ("train", *RECIPE, "--set", "train.epochs=1", "--data", tiny_data, "--run", link, "--overwrite")
    assert trainer(*words)[0] == 0
    assert link.is_symlink()
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-00000003"


@pytest.mark.slow
def test_overwrite_empties_a_mount_point(tiny_data: Path, tiny_run: Path, trainer: Call, tmp_path: Path) -> None:
    """As in a container with ``-v runs:/run``; what mkfs leaves there is nobody's run."""
    with small_disk(tmp_path / "volume", "20m") as volume:
        (volume / "lost+found").mkdir()
        for more in ((), ("--overwrite",)):
            words = ("train", *RECIPE, "--set", "train.epochs=1", "--data", tiny_data, "--run", volume, *more)
            code, _, errors = trainer(*words)
            assert code == 0, errors
            assert checkpoint.latest_checkpoint(volume).name == "step-00000003"


@pytest.mark.parametrize(
    ("answer", "yes", "replaced"), [("n\n", False, False), ("", False, False), ("y\n", False, True), (None, True, True)]
)
def test_a_terminal_is_asked(
    run: Path,
    tiny_data: Path,
    trainer: Call,
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    yes: bool,
    replaced: bool,
) -> None:
    """Anything but yes leaves the run as it is; --yes asks nobody."""
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_: Any) -> str:
            assert answer is not None, "it was asked"
            return super().readline()

    monkeypatch.setattr(sys, "stdin", Terminal(answer or ""))
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    monkeypatch.setattr(launch, "start_towers", lambda run, *_, **__: start.commit_start(run) or 0)
    before = tree(run)
    words = ("train", *RECIPE, "--data", tiny_data, "--run", run, "--overwrite", "--processes", 2)
    code, _, errors = trainer(*words, *(["--yes"] if yes else []))
    assert code == (0 if replaced else 2)
    assert ("removes the run in" in errors) is not yes
    assert (tree(run) == before) is not replaced


# Checkpoints on the way.


def test_a_damaged_newest_is_set_aside_and_the_new_one_kept(run: Path, trainer: Call) -> None:
    """keep_checkpoints = 1, the newest damaged: what is saved next stays, though its step is an older one."""
    back_to(run, LAST)
    flip(checkpoint.folder_of(run, LAST) / "tower-a.safetensors")
    stopped = LAST - 1
    words = ("train", "--resume", run, "--set", "train.keep_checkpoints=1", "--set", "train.checkpoint_every_steps=1")
    code, said, errors = trainer(*words)
    assert code == 0 and f"from step {stopped}" in said
    assert "is damaged: its content has changed; going back to the checkpoint before" in errors
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert checkpoint.folder_of(run, LAST).name in names and f".damaged-step-{LAST:08d}" in names
    assert checkpoint.choose(run).record.step == LAST


@pytest.mark.parametrize("mask", [0o027, *(pytest.param(mask, marks=pytest.mark.slow) for mask in (0o002, 0o077))])
def test_every_file_has_the_permissions_of_the_umask(tiny_data: Path, tmp_path: Path, mask: int) -> None:
    """A run, its checkpoints and its page: readable by whom the umask lets read."""
    before = os.umask(mask)
    try:
        run = make_tiny_run(tmp_path / "run", tiny_data)
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert call(monkeypatch, "report", "--run", run) == 0
    finally:
        os.umask(before)
    for path in run.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
