"""``python -m trainer bench`` finds the bottleneck that a test has put there; no test says how long anything takes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.helpers.benching import SETTINGS, bench_pair, benched, recipe, record_of, slow_net, with_graphs
from tests.helpers.loader_data_set import make_data_set
from tests.helpers.pair import run_mesh
from tests.helpers.slow_disk import slow_file
from tests.helpers.training_commands import CONFIG, run
from trainer.__main__ import main
from trainer.bench.bottleneck import judge
from trainer.bench.measure import measure
from trainer.bench.page import render
from trainer.bench.prediction import predict_rate
from trainer.model import kernels


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large PNGs, of which the net sees 28 px: decoding is most of the work."""
    return make_data_set(tmp_path_factory.mktemp("photos"), encoding="png", train=16, size=(400, 400), shard_size=16)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small raw images: nothing to decode."""
    return make_data_set(tmp_path_factory.mktemp("raw"), encoding="raw", train=64, size=(64, 64), shard_size=32)


def test_one_decoding_thread_is_found(photos, tmp_path):
    for attempt in range(3):  # what else the machine does in these tenths of a second can look like one
        record = benched(recipe("data.threads=1"), photos, tmp_path / str(attempt))
        found = judge(record)
        if (found.side, found.limit) == ("data", "decode"):
            break
    assert (found.side, found.limit) == ("data", "decode")
    read, decode = record.stage("read"), record.stage("decode")
    assert read and decode and decode.ms.median > 3 * read.ms.median
    cores = record.workload.cores
    threads = [s for s in found.suggestions if s.change == f"data.threads = {cores} instead of 1"]
    assert len(threads) == (cores > 1 and not found.doubt)  # a busy machine makes figures of which nothing follows


def test_a_recipe_that_gives_the_net_fewer_threads_is_measured_with_them(raw, tmp_path):
    before = torch.get_num_threads()
    part = measure(
        recipe("train.threads=3"), dataclasses.replace(SETTINGS, data=raw), mesh=None, device="cpu", scratch=tmp_path
    )
    assert part.threads == 3 and torch.get_num_threads() == before
    record = record_of(recipe("train.threads=3"), raw, [part])
    assert record.workload.net_threads == 3 and list(record.by_threads) == [1]


@pytest.mark.slow
def test_a_slow_disk_is_found(tmp_path):
    data = make_data_set(tmp_path, encoding="raw", train=64, size=(64, 64), shard_size=64)
    (tar,) = (data / "train").glob("*.tar")
    try:
        with slow_file(tar, mb_per_s=0.5):
            record = benched(recipe("data.mmap=false", "data.prefetch=1", "train.batch_size=8"), data, tmp_path / "run")
    except OSError as error:
        pytest.skip(f"no FUSE file system can be mounted here: {error}")
    found = judge(record)
    assert (found.side, found.limit) == ("data", "read")
    disk = record.ceiling("disk read")
    assert disk and disk.figure.median < 1.0  # MB/s: the throttle, not the disk below it
    share = record.stages[0].share_of_ceiling
    assert record.stages[0].ceiling == "disk read" and share and share > 0.5


def test_slow_computation_is_found(raw, tmp_path):
    record = benched(recipe(), raw, tmp_path / "slow", slow_net)
    found = judge(record)
    assert (found.side, found.limit) == ("net", "computation")
    forward, backward = record.stage("forward"), record.stage("backward")
    assert forward and backward and forward.ms.median > backward.ms.median
    assert record.loader and record.loader.images_per_s > record.synthetic.images_per_s
    assert record.end_to_end and predict_rate(record) > 0


def test_phases_of_steps_that_are_graphs(raw, tmp_path, monkeypatch):
    """Rates are those of graphs, as training has them; phases are measured beside, and the table says how."""
    monkeypatch.setattr(kernels, "load", lambda: None)
    settings = dataclasses.replace(SETTINGS, data=None, stages=False)
    part = measure(recipe(), settings, mesh=None, device="cpu", scratch=tmp_path, attach=with_graphs)
    graphs = {name for interval in part.intervals["synthetic"] for name, _, _ in interval.spans}
    assert graphs == {"wait", "transfer", "graph", "optimizer", "step"}  # a CPU has no launch that updates all
    record = record_of(recipe(), None, [part])
    stages = {stage.name: stage for stage in record.stages}
    assert stages["forward"].ms.median > 0 and stages["optimizer"].ms.median > 0 and "graph" not in stages
    assert "one CUDA graph" in stages["forward"].note
    assert {span.name for span in record.timeline} == graphs
    assert judge(record).side == "net"
    rates_only = dataclasses.replace(settings, phases=False, seconds=0.1, rounds=1)
    part = measure(recipe(), rates_only, mesh=None, device="cpu", scratch=tmp_path, attach=with_graphs)
    assert set(part.intervals) == {"synthetic"}


@pytest.mark.slow
def test_a_delayed_exchange_is_found(tmp_path):
    parts = run_mesh(bench_pair, str(tmp_path / "slow"), replicas=1)
    record = record_of(recipe(), None, parts)
    found = judge(record)
    assert (found.side, found.limit) == ("net", "exchange")
    crossings = [stage for stage in record.stages if stage.group == "crossing"]
    assert len(crossings) == 8 and {stage.name.split(" ")[1] for stage in crossings} == {"forward", "backward"}
    slow = record.stage("exchange")
    share = slow.share_of_ceiling if slow else None
    assert share is not None and share < 0.5  # the wire itself is not slow: measured below the delayed code
    assert [part.tower for part in parts] == ["a", "b"] and {span.tower for span in record.timeline} == {"a", "b"}
    assert len({span.end_ms for span in record.timeline if span.name == "step"}) == 2


@pytest.mark.slow
def test_the_command_writes_json_and_a_page_that_can_be_read_and_compared(digits, tmp_path):
    out, page = tmp_path / "bench-{node}.json", tmp_path / "bench.html"
    words = ["--set", "train.batch_size=64", "--seconds", "0.1", "--json", out, "--html", page]
    done = run("trainer", "bench", "--config", CONFIG, "--data", digits, *words)
    assert "The limit is " in done.stdout and "predicted from the stages" in done.stdout
    (found,) = tmp_path.glob("bench-*.json")
    assert "{node}" not in found.name
    table = json.loads(found.read_text())
    assert [row["name"] for row in table["stages"][:3]] == ["read", "decode", "augment"]
    assert table["bottleneck"]["limit"] and table["predicted_images_per_s"] > 0
    text = page.read_text()
    assert text.count("<h2>") == 4 and "http" not in text.replace("http-equiv", "")
    done = run("trainer", "bench", "--compare", found, found)
    assert "no difference" in done.stdout and "better" not in done.stdout
    done = run("trainer", "bench", "--read", found, "--project", "4", "--tower-link", "300")
    assert "model, 4 processes" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected --data DIR for a prepared data set, or --synthetic for none"),
        (["--synthetic", "--seconds", "0"], "--seconds is 0: expected more than 0"),
        (["--synthetic", "--project", "3"], "--project is 3: expected 1, or an even number"),
        (["--compare", "a.json", "b.json"], "a.json cannot be read: No such file"),
        (["--compare", "a.json", "b.json", "--html", "c.html"], "--compare prints a table and nothing else"),
        (["--read", "a.json", "--project", "0"], "--project is 0: expected 1, or an even number"),
        (["--read", "a.json", "--tower-link", "50"], "--tower-link belongs to --project N"),
        (["--read", "a.json", "--project", "2", "--tower-link", "-1"], "--tower-link is -1: expected more than 0"),
        (["--read", "a.json", "--html", "nowhere/c.html"], "nowhere/c.html cannot be written: there is no folder"),
    ],
)
def test_wrong_options_are_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trainer", "bench", *words])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_page_has_every_part_where_everything_was_measured(raw, tmp_path):
    record = benched(recipe(), raw, tmp_path)
    text = render(dataclasses.replace(record, sweep={}), judge(record))
    for part in ("Where the time goes", "How near the machine", "One step", "Every figure"):
        assert part in text
    assert "By batch size" not in text
