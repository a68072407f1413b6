"""The table of jobs asks for little, and a node that does not answer hides its own jobs' figures only."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.jobs import overview, submission
from cluster.jobs.client import Client
from tests.helpers.fake_dashboard import fake_dashboard, job
from tests.helpers.local_cluster import wait_until

ROOT = Path(__file__).resolve().parents[2]
LINE = b"prepared 239 / 1,797 images, 48 images/s, 33 s left\n"


@pytest.fixture(autouse=True)
def no_token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def board():
    with fake_dashboard() as board:
        yield board


def result_file(number: int, **record: object) -> tuple[str, bytes]:
    return f"job-result-job-{number:04d}.json", json.dumps(record).encode()


def test_300_jobs_are_one_call_and_one_more_for_each_that_the_list_does_not_tell(board, capsys):
    board.jobs = [job(number, "SUCCEEDED", driver_exit_code=0) for number in range(280)]
    board.jobs += [
        job(number, "FAILED", driver_exit_code=3, message="x\n" + LINE.decode()) for number in range(280, 297)
    ]
    board.jobs += [job(297, "STOPPED"), job(298, "RUNNING", end_time=None), job(299, "PENDING", node=None)]
    name, text = result_file(297, outcome="stopped", exit_code=143, signal="SIGTERM")
    board.files = {name: text, "job-driver-job-0298.log": LINE}
    assert main(["status", "--json", "--address", board.address]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [f"job-{number:04d}" for number in reversed(range(300))], "newest first"
    assert (rows[0]["state"], rows[0]["exit_code"]) == ("pending", None)
    assert (rows[1]["state"], rows[1]["done"], rows[1]["total"], rows[1]["left"]) == ("running", 239, 1797, "33 s")
    assert (rows[2]["state"], rows[2]["exit_code"]) == ("stopped", 143)
    assert (rows[3]["state"], rows[3]["exit_code"], rows[3]["done"]) == ("failed", 3, 239)
    assert (rows[-1]["state"], rows[-1]["exit_code"]) == ("succeeded", 0)
    assert board.calls == {"/api/jobs/": 1, f"file {name}": 1, "file job-driver-job-0298.log": 1}


def test_a_silent_node_hides_only_what_it_knows_itself(board, capsys, monkeypatch):
    ask = overview._ask
    limits = {"mute": 0.3, "well": 60.0}  # a busy machine makes nobody silent who is not
    monkeypatch.setattr(overview, "ALL_S", 60.0)
    monkeypatch.setattr(overview, "_ask", lambda client, job, _: ask(client, job, limits[job["driver_node_id"]]))
    nodes = ["mute", "well", "mute", "well", "mute"] * 8
    board.jobs = [job(number, "RUNNING", node=node) for number, node in enumerate(nodes)]
    board.files = {f"job-driver-job-{number:04d}.log": LINE for number in range(len(nodes))}
    board.silent = {"mute"}
    assert main(["status", "--json", "--address", board.address]) == 0
    told = capsys.readouterr()
    rows = json.loads(told.out)
    assert [row["done"] for row in reversed(rows)] == [239 if node == "well" else None for node in nodes]
    (line,) = told.err.splitlines()
    assert line.startswith("warning: 1 node did not answer in time (mute)")
    expected = 1 + 1 + nodes.count("well")
    wait_until(lambda: sum(board.calls.values()) >= expected, "the call that nobody waited for", timeout_s=60)
    assert sum(board.calls.values()) == expected, "a silent node is asked once"


def test_one_job_is_told_in_full(board, capsys):
    board.jobs = [job(7, "SUCCEEDED", driver_exit_code=0)]
    name, text = result_file(7, outcome="stopped", exit_code=0)
    board.files = {name: text, "job-driver-job-0007.log": LINE}
    assert main(["status", "job-0007", "--json", "--address", board.address]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["exit_code"], row["done"], row["images_per_s"]) == ("stopped", 0, 239, 48.0)


@pytest.mark.parametrize("known", [True, False], ids=["length known", "length unknown"])
def test_the_log_of_a_job_that_is_over_is_fetched_once(board, known):
    log = b"one line\n" * 1000
    board.jobs = [job(7, "SUCCEEDED")]
    name, text = result_file(7, outcome="succeeded", exit_code=0, log_bytes=len(log) if known else None)
    board.files = {name: text, "job-driver-job-0007.log": log}
    stream = io.BytesIO()
    submission.wait(Client(board.address), "job-0007", stream)
    assert stream.getvalue() == log and board.calls["file job-driver-job-0007.log"] == 1


class Followed:
    """A log that has come whole over its stream."""

    def __init__(self, log: bytes) -> None:
        self._log, self.fetched = log, 0

    def follow_log(self, job_id, node_id):
        yield self._log

    def log(self, job_id, node_id, lines=-1):
        self.fetched += 1
        return self._log


@pytest.mark.parametrize(("missing", "fetched"), [(0, 0), (5, 1)], ids=["whole", "cut"])
def test_a_followed_log_is_fetched_again_only_where_something_is_missing(monkeypatch, missing, fetched):
    monkeypatch.setattr(submission, "CATCH_UP_S", 30.0 if not missing else 0.05)
    log = b"line\n" * 100
    client, stream = Followed(log), io.BytesIO()
    follower = submission.LogFollower(client, "job", stream)
    follower.start("node")
    follower.finish("node", len(log) + missing)
    assert stream.getvalue() == log and client.fetched == fetched


def test_a_result_says_how_long_the_log_is(tmp_path):
    command = [sys.executable, "-m", "cluster.jobs.entry", "--", "echo", "hello"]
    with (tmp_path / "log").open("wb") as log:
        environment = {**os.environ, "TWOTOWER_RESULT": str(tmp_path / "result.json")}
        subprocess.run(command, cwd=ROOT, stdout=log, env=environment, check=True, timeout=60)
    assert json.loads((tmp_path / "result.json").read_text())["log_bytes"] == len("hello\n")
