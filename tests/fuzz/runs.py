"""Runs, recipes, results, benchmarks and files of weights of a stranger's making."""

import io
import json
import pickle
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from pipeline.errors import PipelineError
from tests.helpers.fuzzing import Target, mutate_bytes, mutate_json, mutate_text
from tests.helpers.synthetic_run import make_run
from trainer.bench.bottleneck import judge
from trainer.bench.page import render
from trainer.bench.record import read_record
from trainer.config import from_toml, load_config
from trainer.errors import TrainerError
from trainer.model.weight_files import read_weight_file
from trainer.model.weights import merge_towers
from trainer.report import figures, run_data
from trainer.training import checkpoint, history, resume, run_folder, run_lock
from trainer.training.epochs import EpochTable
from trainer.training.evaluate import load_network
from trainer.training.metrics import MetricsLog
from trainer.training.rows import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.channels=[4,4,4,4,4]", "model.hidden=[8,8]", "train.loggers=[]", "train.batch_size=8")
ALLOWED = (TrainerError, PipelineError)
torch.set_num_threads(1)  # inputs are run in forks


def _run_files() -> dict[str, bytes]:
    """A small run, by name."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", load_config(ROOT / "configs" / "digits.toml", SMALL), steps=44)
        environment = json.loads((run / "environment.json").read_text())
        part = {"step": 4, "command": "x", "changed": {"train.epochs": [2, 3]}, "elapsed_s": 1.5, "data": "/d"}
        environment |= {"processes": 2, "replicas": 1, "device": "cpu", "data": "/d", "resumed": [part]}
        (run / "environment.json").write_text(json.dumps(environment, indent=1))
        (run / ".lock").write_text(json.dumps({"host": "h", "boot": "b", "pid": 7, "since": "now"}))
        rows = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join([*rows[:3], *rows[-3:]]) + "\n")
        return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


RUN = _run_files()
NEWEST = max(name.rpartition("/")[0] for name in RUN if name.endswith("checkpoint.json"))
WEIGHTS = [name for name in RUN if name.endswith(".safetensors")]


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / name).write_bytes(content)
    return folder / "run"


def _mutated(rng: random.Random, content: bytes, outside: Path) -> bytes:
    """JSON by its values, else text by its words and numbers, now and then bytes."""
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(rng, content)
    if kind == 1:
        return rng.choice((b"", b"[" * 100_000, b"{}", b"null", b"1e999", b"\xff\xfe", b'{"a":' * 20_000))
    text = content.decode()
    try:
        value = json.loads(text)
    except ValueError:
        return mutate_text(rng, text).encode(errors="surrogatepass")
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = mutate_json(rng, value, outside)
    return json.dumps(value).encode(errors="surrogatepass")


def _spoil(names: list[str]) -> Callable[[random.Random, Path], Any]:
    """One file of the run made another one; or a link to outside, to a device or to itself put in its place."""

    def make(rng: random.Random, outside: Path) -> tuple[str, bytes | str]:
        name = rng.choice(names)
        if rng.random() < 0.1:
            return name, rng.choice((str(outside / "precious"), "/dev/zero", "/dev/stdin", "nothing", Path(name).name))
        if name.endswith(".safetensors"):
            return name, mutate_bytes(rng, RUN[name])
        if name == "metrics.jsonl":
            lines = RUN[name].splitlines()
            at = rng.randrange(len(lines))
            lines[at] = _mutated(rng, lines[at], outside)
            return name, b"\n".join(lines) + b"\n"
        return name, _mutated(rng, RUN[name], outside)

    return make


def _spoiled(folder: Path, made: tuple[str, bytes | str]) -> Path:
    run, (name, content) = _write(folder, RUN), made
    (run / name).unlink()
    if isinstance(content, str):
        (run / name).symlink_to(content)
    else:
        (run / name).write_bytes(content)
    return run


def _load(folder: Path, made: tuple[str, bytes | str]) -> None:
    load_network(_spoiled(folder, made))


def _load_rehashed(folder: Path, content: bytes) -> None:
    """Weights that the record calls whole: the stranger has written both."""
    run = _write(folder, RUN)
    path = run / NEWEST / "tower-a.safetensors"
    path.write_bytes(content)
    record = json.loads((run / NEWEST / "checkpoint.json").read_text())
    record["files"]["tower-a.safetensors"] = checkpoint._facts(path)
    (run / NEWEST / "checkpoint.json").write_text(json.dumps(record))
    load_network(run)


def _rehashed(rng: random.Random, outside: Path) -> bytes:
    content = RUN[f"{NEWEST}/tower-a.safetensors"]
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    head = mutate_json(rng, json.loads(content[8 : 8 + size]), outside)
    text = json.dumps(head).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _read_all(folder: Path, made: tuple[str, bytes | str]) -> None:
    """All that looks at a run without its weights: the report's facts and curves, resuming, the lock, epochs.csv."""
    run = _spoiled(folder, made)
    run_folder.is_begun(run)
    config = run_folder.read_run_config(run)
    resume.noted_options(run), history.read_past(run, 44), history.read_elapsed_s(run), run_lock.read_holder(run)
    table = EpochTable(run)
    for row in read_metrics(run):
        table.add(row)
    table.write()
    MetricsLog(run, config, 3).close("stopped")
    found = run_data.read_run(run)
    run_data.headline(found), run_data.facts(found, ""), figures.traffic_of(found)


def _recipe(rng: random.Random, _: Path) -> str:
    text = RUN["config.toml"].decode()
    for _ in range(rng.choice((1, 1, 2, 4))):
        text = mutate_text(rng, text)
    return text


def _read_recipe(folder: Path, text: str) -> None:
    path = folder / "x.toml"
    path.write_text(text, errors="surrogatepass")
    for read in (lambda: load_config(path), lambda: from_toml(text)):
        try:
            read().model.count_weights()
        except ALLOWED as error:
            assert "\n" not in str(error).strip(), error


def _bench() -> dict[str, Any]:
    from tests.trainer.bench.test_arithmetic import a_record
    from trainer.bench.record import to_json

    return json.loads(to_json(a_record(processes=2)))


BENCH = _bench()


def _read_bench(folder: Path, value: Any) -> None:
    path = folder / "bench.json"
    path.write_text(json.dumps(value) if not isinstance(value, bytes) else value.decode("latin1"))
    record = read_record(path)
    if record.sweep or record.scaling or abs(record.training.ms.median) > 1e9:
        return  # charts take a second
    render(record, judge(record))


def _weight_files() -> dict[str, bytes]:
    """The same small net as every kind of file."""
    with tempfile.TemporaryDirectory() as folder:
        merged = merge_towers(load_network(_write(Path(folder), RUN)).net)
        zipped, torched = io.BytesIO(), io.BytesIO()
        np.savez(zipped, **{name: tensor.numpy() for name, tensor in merged.items()})
        torch.save(merged, torched)
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    layers = [{"name": "conv1a", "inputs": ["data"], "weights": [array], "biases": array[0], "filterSize": [1]}]
    return {
        "net.safetensors": save(merged),
        "net.npz": zipped.getvalue(),
        "net.pth": torched.getvalue(),
        "ckpt": pickle.dumps({"model_state": {"layers": layers}}, protocol=2),
    }


FILES = _weight_files()


def _weights(rng: random.Random, _: Path) -> tuple[str, bytes]:
    name = rng.choice(list(FILES))
    return name, mutate_bytes(rng, FILES[name], list(FILES.values()))


def _read_weights(folder: Path, made: tuple[str, bytes]) -> None:
    path = folder / made[0]
    path.write_bytes(made[1])
    read_weight_file(path)


TARGETS = [
    Target("checkpoint of a run", _spoil([*WEIGHTS, f"{NEWEST}/checkpoint.json"]), _load, ALLOWED, 0.3),
    Target("weights with a right record", _rehashed, _load_rehashed, ALLOWED, 0.3),
    Target("records of a run", _spoil([name for name in RUN if name not in WEIGHTS]), _read_all, ALLOWED, 0.5),
    Target("recipe", _recipe, _read_recipe, ALLOWED, 0.4),
    Target("benchmark's result", lambda rng, outside: mutate_json(rng, BENCH, outside), _read_bench, ALLOWED, 0.3),
    Target("file of weights", _weights, _read_weights, ALLOWED, 0.4),
]
