"""A run that a stranger made: nothing outside it is read, written or fetched, and no line and no page is forged."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.loader import staging
from tests.helpers.tiny_run import RECIPE
from tests.helpers.trees import tree
from trainer.training import checkpoint, run_folder

Call = Callable[..., tuple[int, str, str]]
EVIL = "cat\nerror: the disk is gone\x1b[2J\u202e[red]<script>alert(1)</script>"
ADDRESS = "http://user:s3cret@127.0.0.1:9/data?X-Amz-Signature=abc123"


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a whole run, to be tampered with; beside it ``precious``, which must stay as it is."""
    (tmp_path / "precious").write_text("mine")
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def newest(run: Path) -> Path:
    found = checkpoint.latest_checkpoint(run)
    assert found is not None
    return found


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LINKED = [
    *("config.toml", "environment.json", "result.json", "metrics.jsonl", ".lock", "epochs.csv", "report.html"),
    *("trained_on", "checkpoints", ".start", "tensorboard", "loggers", "trained_on/manifest.json"),
]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_run_is_neither_read_nor_written(
    run: Path, tiny_data: Path, trainer: Call, tmp_path: Path, name: str
) -> None:
    """Each of a run's names as a link to the user's own: with every command that reads or changes a run."""
    path, outside = run / name, tmp_path / "outside"
    outside.mkdir()
    if path.exists():
        path.rename(outside / "moved")
    elif not path.suffix and name != ".lock":
        (outside / "moved").mkdir()
        (outside / "moved" / "step-00000001").mkdir()
    else:
        (outside / "moved").write_text("mine")
    path.symlink_to(outside / "moved")
    before = tree(outside)
    for words in (
        ("train", "--resume", run, "--data", tiny_data, "--set", "train.epochs=3"),
        ("train", *RECIPE, "--run", run, "--data", tiny_data, "--overwrite", "--yes"),
        ("report", "--run", run),
        ("export", "--run", run, "--output", tmp_path / "net.safetensors"),
    ):
        code, _, errors = trainer(*words)
        assert code == 2 and f"{path} is a link" in errors, (words, errors)
        assert len(errors.splitlines()) == 1
    assert tree(outside) == before and not (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize("name", ["tower-a.safetensors", "tower-b.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "../../../precious"])
def test_a_device_in_a_checkpoint_is_not_read(run: Path, trainer: Call, tmp_path: Path, name: str, target: str) -> None:
    """It neither waits nor reads without end; the checkpoint is damaged, and the one before is taken."""
    path = newest(run) / name
    path.unlink()
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    code, _, errors = trainer("export", "--run", run, "--output", tmp_path / "net.safetensors", "--no-preprocessing")
    assert code == 0 and f"warning: {path} is damaged" in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    "files",
    [{}, {"/dev/zero": {}}, {"../../../precious": {}}, {"tower-b.safetensors": {}}, {"tower-a.safetensors": {}}],
)
def test_a_record_names_the_towers_and_nothing_else(run: Path, files: dict[str, object]) -> None:
    """No files at all is not whole; nor is one whose hash is not said."""
    edit(newest(run) / checkpoint.RECORD, files=files)
    found = checkpoint.choose(run)
    assert found is not None and found.folder != newest(run), "the newest is passed over"


@pytest.mark.parametrize("step", [True, -1, 1 << 70, 6.0, "6", None])
def test_a_record_of_an_odd_step_is_damaged(run: Path, step: object) -> None:
    edit(newest(run) / checkpoint.RECORD, step=step)
    found = checkpoint.choose(run)
    assert found is not None and found.folder != newest(run)


def rewrite(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes tower a's weights, and says in the record that this is right, as the maker of a run can."""
    path = newest(run) / "tower-a.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    record = json.loads((newest(run) / checkpoint.RECORD).read_text())
    record["files"][path.name] = checkpoint._facts(path)
    (newest(run) / checkpoint.RECORD).write_text(json.dumps(record))


CHANGES: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda tensors: tensors["conv1.weight"].fill_(float("nan")), "NaN"),
    (lambda tensors: tensors["fc8.bias"].fill_(float("inf")), r"\(NaN\) or infinite"),
    (lambda tensors: tensors.pop("conv3.bias"), "conv3.bias is nothing"),
    (lambda tensors: tensors.update({"fc6.bias": torch.zeros(3)}), r"fc6.bias is \(3,\)"),
    (lambda tensors: tensors.update({"fc8.bias": tensors["fc8.bias"].long()}), "holds torch.int64"),
]


@pytest.mark.parametrize(("change", "why"), CHANGES)
def test_weights_that_are_none_are_one_line(
    run: Path, trainer: Call, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], why: str
) -> None:
    rewrite(run, change)  # type: ignore[arg-type]
    words = ("export", "--run", run, "--output", tmp_path / "x.safetensors", "--no-preprocessing")
    code, _, errors = trainer(*words)
    assert code == 2 and len(errors.splitlines()) == 1
    assert re.search(why, errors), errors


@pytest.mark.parametrize(
    "setting",
    [
        "channels = [1000000000, 4, 4, 4, 4]",
        "hidden = [100000000000, 8]",
        "image_px = 1000000",
        "classes = 99999999999",
    ],
)
def test_an_absurd_recipe_takes_no_memory(run: Path, trainer: Call, tmp_path: Path, setting: str) -> None:
    """One line, before a net of such a size is made."""
    path, name = run / run_folder.CONFIG_NAME, setting.partition(" ")[0]
    lines = [setting if line.startswith(f"{name} =") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    for words in (("export", "--run", run, "--output", tmp_path / "x.onnx"), ("report", "--run", run)):
        code, _, errors = trainer(*words)
        assert code == 2 and len(errors.splitlines()) == 1 and "taken" in errors + "taken" * ("crop_px" in errors)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "x" * (2 << 20), "a = " + "9" * 5000, "\udcff"])
def test_a_recipe_that_nobody_wrote(run: Path, trainer: Call, tmp_path: Path, text: str) -> None:
    (run / run_folder.CONFIG_NAME).write_bytes(text.encode(errors="surrogateescape"))
    code, _, errors = trainer("export", "--run", run, "--output", tmp_path / "x.onnx")
    assert code == 2 and len(errors.splitlines()) == 1 and "cannot be read as TOML" in errors


def test_no_address_is_fetched_because_a_run_names_it(
    run: Path, trainer: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor is its password shown."""

    def fetch(url: object, *_: object) -> None:
        raise AssertionError(f"fetched {url}")

    monkeypatch.setattr(staging, "_fetch_text", fetch)
    edit(run / run_folder.ENVIRONMENT_NAME, data=ADDRESS)
    code, _, errors = trainer("evaluate", "--run", run)
    assert code == 2 and "no address is fetched because a run names it" in errors
    assert "http://***@127.0.0.1:9/data?X-Amz-Signature=***" in errors
    assert trainer("train", "--resume", run, "--set", "train.epochs=3")[0] == 2
    shutil.rmtree(run / run_folder.DATA_SET_NAME)
    said = [trainer("predict", "--run", run, tmp_path / "precious"), trainer("report", "--run", run)]
    said += [trainer("export", "--run", run, "--output", tmp_path / "x.onnx")]
    assert not any("s3cret" in text or "abc123" in text for code, *texts in said for text in texts)


def test_an_address_is_noted_without_its_secrets(
    run: Path, tiny_data: Path, trainer: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``--data http://user:password@...?sig=...``: neither environment.json nor the report nor a line has it."""
    import trainer.train_command as train_command

    monkeypatch.setattr("pipeline.loader.staging.stage", lambda data, cache=None: tiny_data)
    assert train_command.stage_data is not None
    other = tmp_path / "other"
    recipe = ("--config", run / run_folder.CONFIG_NAME, "--set", "train.epochs=1")
    code, *said = trainer("train", *recipe, "--data", ADDRESS, "--run", other)
    assert code == 0, said
    written = (other / "environment.json").read_text()
    assert "***@127.0.0.1:9" in written
    trainer("report", "--run", other)
    for text in (written, (other / "report.html").read_text(), *said):
        assert "s3cret" not in text and "abc123" not in text


def test_what_a_run_says_of_itself_stays_text(run: Path, trainer: Call) -> None:
    """On the page escaped, with a policy that lets nothing run and nothing be fetched; on the terminal in its line."""
    environment = {"command": EVIL, "commit": EVIL, "processor": EVIL, "gpus": [EVIL], EVIL: EVIL, "data": EVIL}
    later = {"step": 4, "command": EVIL, "changed": {EVIL: [EVIL, EVIL]}}
    edit(run / run_folder.ENVIRONMENT_NAME, **environment, resumed=[later])
    edit(run / run_folder.RESULT_NAME, reason=EVIL, exit_reason=EVIL)
    code, said, errors = trainer("report", "--run", run)
    page = (run / "report.html").read_text()
    assert code == 0 and said == f"{run / 'report.html'}\n" and not errors
    assert "<script" not in page.lower() and "&lt;script&gt;" in page
    policy = page.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert "default-src 'none'" in policy and "script" not in policy.replace("script-src 'none'", "")
    (run / "evil\nerror: forged").mkdir()
    code, said, errors = trainer("report", "--run", run / "evil\nerror: forged")
    assert code == 2 and len(errors.splitlines()) == 1 and r"evil\nerror: forged" in errors


WRONG: list[tuple[str, object]] = [
    ("ledger", [{"direction": "x"}]), ("top1", 2), ("num_samples", -1), ("step", "9"), ("processes", []),
    ("images_per_s", "1e999"), ("elapsed_s", {"a": 1}), ("reason", ["x"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_result_of_other_types_is_one_line(run: Path, trainer: Call, name: str, value: object) -> None:
    edit(run / run_folder.RESULT_NAME, **{name: value})
    code, _, errors = trainer("report", "--run", run)
    assert code == 2 and len(errors.splitlines()) == 1 and f"is damaged ({name} is " in errors


def test_rows_that_are_none_are_left_out(run: Path, trainer: Call) -> None:
    """Huge, nested, of other types, or numbers that nothing measures."""
    path = run / "metrics.jsonl"
    whole = path.read_text()
    rows = ["[" * 100_000, '{"kind":"step","step":7,"epoch":0,"loss":' + "9" * 400 + "}", '{"kind":"step","step":-7}']
    rows += ['{"kind":"step","step":7,"epoch":0,"loss":1,"x":"' + "y" * (2 << 20) + '"}', '{"kind":[],"step":1}', "5"]
    rows += ['{"kind":"evaluation","step":7,"epoch":1,"loss":1,"top1":"x","top5":1,"num_samples":5}']
    path.write_text("\n".join([*rows, whole]))
    assert trainer("report", "--run", run)[0] == 0
    from trainer.training.rows import read_metrics

    assert [json.dumps(row) for row in read_metrics(run)] == whole.splitlines()


def test_names_of_classes_stay_text_in_a_drawing() -> None:
    """No formula, no markup, no link, no line of its own."""
    import numpy as np

    from trainer.report.confusion import confusion_svg

    names = [r"$\frac{$", "<script>1</script>", "a\nb\x1b[2J", '"onload=x']
    drawn = str(confusion_svg(np.eye(4, dtype=np.int64), names))
    assert r"$\frac{$" in drawn and "&lt;script&gt;" in drawn and r"a\nb\x1b[2J" in drawn
    assert "<script" not in drawn and "href" not in drawn
