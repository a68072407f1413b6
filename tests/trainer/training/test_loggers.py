"""Loggers: each fails alone and holds nobody up; Weights & Biases and MLflow read back what they were given."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.synthetic_run import digits_config
from tests.helpers.tiny_run import LAST, RECIPE, make_tiny_data
from trainer.bench.timing import TimedTrainer
from trainer.config import LOGGERS, Config, TrainConfig
from trainer.training import loggers, run_folder
from trainer.training.loggers import Loggers, recall, scalars_of

ROOT = Path(__file__).resolve().parents[3]
ROW = {"kind": "step", "step": 1, "epoch": 0, "loss": 1.5, "gradient_norm": {"a": 3.0, "b": 4.0}}


def config_with(*names: str) -> Config:
    return Config(train=TrainConfig(loggers=names))


class Kept:
    """A logger that keeps what it is given; with ``fails_in`` it raises there."""

    def __init__(self, fails_in: str = "") -> None:
        self.rows: list[dict[str, Any]] = []
        self.ended, self._fails_in = "", fails_in

    def _reach(self, name: str) -> None:
        if name == self._fails_in:
            raise OSError(f"no {name} today\nand more lines")

    def add(self, row: dict[str, Any], at_s: float) -> None:
        self._reach("add")
        self.rows.append(row)

    def flush(self) -> None:
        self._reach("flush")

    def close(self, exit_reason: str) -> None:
        self._reach("close")
        self.ended = exit_reason


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A third logger: one module, as one file would be."""
    module = types.ModuleType("trainer.training.loggers.third")
    module.IN_BACKGROUND, module.made = False, Kept()
    module.open_logger = lambda run, config, from_step: module.made
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def opened(folder: Path, *names: str) -> Loggers:
    config = config_with()
    object.__setattr__(config.train, "loggers", names)  # "third" is no file
    return Loggers(folder, config, from_step=1)


def test_the_names_of_a_recipe_are_the_files() -> None:
    assert LOGGERS == ("mlflow", "tensorboard", "wandb") and TrainConfig().loggers == ("tensorboard",)


def test_numbers_of_a_row() -> None:
    assert scalars_of(ROW) == {"step/loss": 1.5, "step/gradient_norm_a": 3.0, "step/gradient_norm_b": 4.0}


@pytest.mark.parametrize("in_background", [False, True])
def test_a_third_logger_gets_every_row_and_the_end(
    third: types.ModuleType, tmp_path: Path, in_background: bool
) -> None:
    third.IN_BACKGROUND = in_background
    found = opened(tmp_path, "third")
    for step in range(1, 101):
        found.add(ROW | {"step": step}, 1.0)
    found.flush()
    found.close("stopped")
    assert [row["step"] for row in third.made.rows] == list(range(1, 101)) and third.made.ended == "stopped"


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("where", ["open", "add", "flush", "close"])
def test_a_logger_that_fails_is_one_line_and_the_others_go_on(
    third: types.ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], where: str, in_background: bool
) -> None:
    third.IN_BACKGROUND, third.made = in_background, Kept(where)
    if where == "open":
        third.open_logger = lambda run, config, from_step: third.made._reach("open")
    found = opened(tmp_path, "third", "tensorboard")
    for step in (1, 2, 3):
        found.add(ROW | {"step": step}, 1.0)
        found.flush()
    found.close("finished")
    line = f"warning: train.loggers: third is left out from now on, training goes on: no {where} today\n"
    assert capfd.readouterr().err == line
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_library_that_is_not_installed_is_named_with_its_fix(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    found = opened(tmp_path, "wandb")
    found.add(ROW, 1.0)
    found.close("finished")
    assert "wandb is not installed; pip install -e '.[wandb]'\n" in capfd.readouterr().err


def test_a_logger_that_never_answers_holds_up_no_step_and_the_end_only_for_a_while(
    third: types.ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    third.IN_BACKGROUND = True
    third.open_logger = lambda run, config, from_step: answer.wait() and third.made
    monkeypatch.setitem(loggers.CLOSE_S, "finished", 0.05)
    monkeypatch.setattr(loggers, "MOST_WAITING", 3)
    found = opened(tmp_path, "third")
    for step in range(1, 3):
        found.add(ROW | {"step": step}, 1.0)
    found.close("finished")
    assert "no answer at the end of the run" in capfd.readouterr().err
    full = opened(tmp_path, "third")
    for step in range(1, 9):
        full.add(ROW | {"step": step}, 1.0)
    full.close("finished")
    assert capfd.readouterr().err.count("no answer while 3 rows were waiting\n") == 1
    answer.set()


def test_nobody_logs_in_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb is replaced: what counts is that it is asked not to ask, and that nothing begins."""
    fake = types.ModuleType("wandb")
    fake.login = lambda prompt: prompt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    opened(tmp_path, "wandb").close("finished")
    assert "nobody is logged in: run wandb login" in capfd.readouterr().err


# With the libraries themselves, in processes of their own: a run in two parts, all of it offline.

READ = """
import json, os, sys
from pathlib import Path
run = Path(sys.argv[1])
found = {"wandb": [], "mlflow": {}}
from wandb.proto import wandb_internal_pb2

def blocks(data):  # wandb's file is a LevelDB log behind seven bytes; its records are wandb's protobuf messages
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""

for path in sorted((run / "loggers" / "wandb").glob("offline-run-*/run-*.wandb")):
    rows = []
    for data in blocks(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        if record.WhichOneof("record_type") == "run":
            name, keys = record.run.run_id, [u.key for u in record.run.config.update]
    found["wandb"].append({"id": name, "config": keys, "rows": rows})
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow.tracking import MlflowClient
client = MlflowClient((run / "loggers" / "mlflow").absolute().as_uri())
(experiment,) = [e for e in client.search_experiments() if e.name == "twotower"]
(logged,) = client.search_runs([experiment.experiment_id])
history_of = lambda name: client.get_metric_history(logged.info.run_id, name)
history = {name: [(m.step, m.value) for m in history_of(name)] for name in logged.data.metrics}
found["mlflow"] = {"status": logged.info.status, "params": logged.data.params, "history": history}
print(json.dumps(found))
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")


IMPATIENT = """
import sys
from trainer.training import loggers
loggers.CLOSE_S["finished"] = 5
from trainer.__main__ import run
sys.exit(run())
"""


def train(*words: str, impatient: bool = False) -> subprocess.CompletedProcess[str]:
    """``impatient``: the end of the run does not wait for 30 s for services, but for 5 s."""
    command = [sys.executable, *(("-c", IMPATIENT) if impatient else ("-m", "trainer")), "train", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220, check=False)


@pytest.mark.slow
def test_a_run_in_two_parts_is_one_run_to_both_libraries(offline: None, tmp_path: Path) -> None:
    data, run = make_tiny_data(tmp_path / "data"), tmp_path / "run"
    both = ("--set", "train.loggers=wandb,mlflow")
    done = train(*RECIPE, *both, "--set", "train.epochs=1", "--data", str(data), "--run", str(run))
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    kept = recall(run, "wandb"), recall(run, "mlflow")
    done = train("--resume", str(run), "--set", "train.epochs=2")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert (recall(run, "wandb"), recall(run, "mlflow")) == kept and all(kept)
    read = subprocess.run([sys.executable, "-c", READ, str(run)], capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if row["kind"] == "step"]
    top1 = [(row["step"], row["top1"]) for row in rows if row["kind"] == "evaluation"]
    assert [step for step, _ in losses] == list(range(1, LAST + 1))
    mlflow = found["mlflow"]
    assert sorted(mlflow["history"]["step/loss"]) == [list(pair) for pair in losses]
    assert sorted(mlflow["history"]["evaluation/top1"]) == [list(pair) for pair in top1]
    assert mlflow["status"] == "FINISHED" and mlflow["params"]["train.batch_size"] == "8"
    first, second = found["wandb"]
    assert first["id"] == second["id"] == kept[0]["id"] and "train.batch_size" in first["config"]
    logged = {row["_step"]: row["step/loss"] for part in (first, second) for row in part["rows"] if "step/loss" in row}
    assert sorted(logged.items()) == losses


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_a_run_whose_services_are_gone_is_the_same_run(
    offline: None, silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, plain, alone = make_tiny_data(tmp_path / "data"), tmp_path / "plain", tmp_path / "alone"
    assert train(*RECIPE, "--data", str(data), "--run", str(plain)).returncode == 0
    for name, value in {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "MLFLOW_TRACKING_URI": silent_server,
    }.items():
        monkeypatch.setenv(name, value)
    words = ("--set", "train.loggers=wandb,mlflow", "--data", str(data), "--run", str(alone))
    done = train(*RECIPE, *words, impatient=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for name in ("wandb", "mlflow"):
        assert sum(line.startswith(f"warning: train.loggers: {name} is left out") for line in lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for tower in "ab":
        file = f"checkpoints/step-{LAST:08d}/tower-{tower}.safetensors"
        assert (plain / file).read_bytes() == (alone / file).read_bytes()


def test_a_benchmark_logs_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the recipe says: only what is measured, TensorBoard's file."""
    config = digits_config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, loggers=("wandb", "mlflow")))
    monkeypatch.setattr(loggers, "_Background", None)  # any use of it fails
    trainer = TimedTrainer(config, None, tmp_path, mesh=None, device="cpu")
    assert trainer.config.train.loggers == ("tensorboard",)
    trainer.end()


def test_a_replaced_run_is_a_new_one_to_its_loggers(tmp_path: Path) -> None:
    loggers.note(tmp_path, "wandb", {"id": "old"})
    assert recall(tmp_path, "wandb") == {"id": "old"}
    run_folder.empty(tmp_path)
    assert recall(tmp_path, "wandb") == {}
