"""Jobs without a cluster: what is sent, how a log is followed and shown, how a job ended, `submit --every-node`."""

import io
import json
import shlex
import threading

import pytest
import requests

from cluster.__main__ import main
from cluster.jobs import every_node, submission
from cluster.jobs.progress import BarStream, latest, parse


def test_print_shows_the_equal_ray_command(monkeypatch, capsys):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    command = ["python", "-m", "pipeline", "prepare", "--output", "/data/a b"]
    assert main(["submit", "--print", "--id", "x", "--env", "A=1", "--", *command]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --submission-id x ")
    assert line.endswith("-- exec python -m cluster.jobs.entry -- python -m pipeline prepare --output '/data/a b'")
    words = shlex.split(line)
    variables = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    assert variables["A"] == "1" and set(variables) <= {"A", "TWOTOWER_COMMIT"}


def test_job_ids_say_what_they_do_and_differ():
    ids = {submission.new_job_id(["python", "-m", "pipeline", "prepare", "--source", "digits"]) for _ in range(20)}
    assert len(ids) == 20 and all(job.startswith("prepare-") for job in ids)


class BreakingClient:
    """A log whose connection breaks after every few bytes, also in the middle of a character."""

    def __init__(self, log: bytes) -> None:
        self._log, self._length = log, 0
        self.everything_served = threading.Event()

    def follow_log(self, job_id, node_id):
        self._length += 5
        yield self._log[:3]
        yield self._log[3 : self._length]
        if self._length > len(self._log) // 2:
            self.everything_served.set()
        raise requests.ConnectionError("broken")

    def log(self, job_id, node_id, lines=-1):
        return self._log


def test_log_is_shown_once_and_whole_though_the_connection_breaks(monkeypatch):
    monkeypatch.setattr(submission, "POLL_S", 0.001)
    log = "zeile eins é\nzeile zwei ü\n".encode() * 4
    client, stream = BreakingClient(log), io.BytesIO()
    follower = submission.LogFollower(client, "job", stream)
    follower.start("node")
    assert client.everything_served.wait(30)
    follower.finish("node")
    assert stream.getvalue() == log


OURS, PLAIN = "exec python -m cluster.jobs.entry -- python -m pipeline prepare", "echo a -- b"


@pytest.mark.parametrize(
    ("entrypoint", "job", "end"),
    [
        (OURS, {"status": "STOPPED"}, "stopped by force: it did not end in time after SIGTERM: exit code 137"),
        (OURS, {"status": "FAILED", "driver_exit_code": -9}, "killed together with its wrapper: exit code 137"),
        (OURS, {"status": "FAILED", "driver_exit_code": 3, "message": "x"}, "failed x: exit code 3"),
        (OURS, {"status": "FAILED", "message": "The node\x1b[2J died"}, r"lost The node\x1b[2J died: exit code 70"),
        (PLAIN, {"status": "SUCCEEDED", "driver_exit_code": 0}, "succeeded: exit code 0"),
        (PLAIN, {"status": "SUCCEEDED", "driver_exit_code": None}, "succeeded: exit code 0"),
        (PLAIN, {"status": "STOPPED"}, "stopped by Ray: exit code 137"),
        (PLAIN, {"status": "FAILED", "driver_exit_code": 137}, "killed: exit code 137"),
        (PLAIN, {"status": "FAILED", "driver_exit_code": 7, "message": "why\nmore"}, "failed: exit code 7"),
    ],
)
def test_ending_without_a_result_file(entrypoint, job, end):
    """A job whose node died with it, or one that plain `ray job submit` has sent."""

    class NoResult:
        def result(self, job):
            return None

    assert str(submission.ending(NoResult(), {"entrypoint": entrypoint, **job})) == end


def test_a_job_is_shown_without_our_wrapper_and_only_ours():
    assert submission.command_line({"entrypoint": OURS}) == "python -m pipeline prepare"
    assert submission.command_line({"entrypoint": PLAIN}) == PLAIN


@pytest.mark.parametrize(
    "job_id", ["", "a/b", "a b", "..", ".x", "-x", "a\nb", "a\x1b[2J", "é", "x" * 101, "a?b", "a\n"]
)
def test_an_id_that_is_no_name_is_refused(job_id, capsys):
    assert main(["submit", "--print", f"--id={job_id}", "--", "true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --id ") and "expected up to 100 letters" in line


@pytest.mark.parametrize("pair", ["A", "=1", "A B=1", "1A=2", "A=\0", "A\n=1"])
def test_a_variable_that_is_none_is_refused(pair, capsys):
    assert main(["submit", "--print", "--env", pair, "--", "true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected NAME=VALUE" in line


def test_words_with_blanks_stay_words(capsys):
    words = ["submit", "--print", "--python", "/opt/my python", "--env", "A=x y;z", "--", "echo", "a'b", "$HOME"]
    assert main(words) == 0
    line = capsys.readouterr().out.strip()
    assert line.endswith("""-- exec '/opt/my python' -m cluster.jobs.entry -- echo 'a'"'"'b' '$HOME'""")


@pytest.mark.parametrize(
    ("line", "done", "total", "rate", "left"),
    [
        ("prepared 239 / 1,797 images, 48 images/s, 33 s left", 239, 1797, 48.0, "33 s"),
        ("(RayTrainWorker pid=7) step 55/88  epoch 3  loss 1.7552  921 images/s", 55, 88, 921.0, ""),
        ("epoch 2/4: top-1 0.5222, top-5 0.9389 on 360 held-out images, 1,742.5 images/s", 2, 4, 1742.5, ""),
        ("shards 3/12", 3, 12, None, ""),
    ],
)
def test_progress_lines(line, done, total, rate, left):
    progress = parse(line)
    assert (progress.done, progress.total, progress.images_per_s, progress.left) == (done, total, rate, left)


@pytest.mark.parametrize(
    "line", ["data set: /data/1/2 (7710be)", "finished at step 88: /runs/1", "", "2026/11/22 10:00"]
)
def test_other_lines_are_no_progress(line):
    assert parse(line) is None


def test_latest_progress_prefers_a_line_with_a_rate():
    assert latest("step 1/4 10 images/s\nstep 2/4 10 images/s\ndone 4/4\n").done == 2
    assert latest("shards 1/4\nshards 2/4\n").done == 2
    assert latest("nothing here\n") is None


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        ("python -m pipeline prepare --output /data/train", "prepare"),
        ("python -m cluster.training.ray_train --towers 2 -- python -m trainer train --run /r", "train"),
        ("/usr/bin/sleep 3", "sleep"),
        ("python -c pass", "job"),
    ],
)
def test_stage_of_a_command(command, stage):
    assert submission.stage_of(command.split()) == stage


def test_bar_replaces_progress_lines_and_passes_all_others():
    terminal = io.BytesIO()
    stream = BarStream(terminal)
    log = b"begin\nprepared 2 / 8 images, 48 images/s, 33 s left\nwarning\nprepared 8 / 8 images, 50 images/s\nend"
    for start in range(0, len(log), 5):  # pieces that end anywhere
        stream.write(log[start : start + 5])
    stream.close()
    shown = terminal.getvalue().decode()
    assert "prepared" not in shown
    assert "25%  2/8  48 images/s  33 s left" in shown and "100%  8/8" in shown
    plain = [line.rpartition("\x1b[K")[2] for line in shown.split("\n")]
    assert plain[:2] == ["begin", "warning"] and plain[-2:] == ["end", ""]


def test_nodes_on_one_host_get_numbers():
    assert every_node.unique_names(["a", "b", "a"]) == ["a-1", "b", "a-2"]
    assert every_node.unique_names(["a"]) == ["a"]


def test_the_command_is_wrapped(capsys):
    command = ["--every-node", "--", "python", "-m", "trainer", "bench", "--synthetic"]
    assert main(["submit", "--address", "http://127.0.0.1:1", "--print", *command]) == 0
    assert "python -m cluster.jobs.every_node -- python -m trainer bench --synthetic" in capsys.readouterr().out


def test_every_node_and_towers_exclude_each_other(capsys):
    words = ["submit", "--address", "http://127.0.0.1:1", "--print", "--every-node", "--towers", "2", "--", "true"]
    assert main(words) == 2
    assert "leave --towers and --replicas out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "expected"), [("import sys; sys.exit(5)", 5), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_node_reports_the_exit_code_and_tells_the_command_its_name(code, expected, capfd):
    assert (
        every_node.run_here(
            ["python", "-c", f"import os; print(os.environ['TWOTOWER_NODE'], flush=True); {code}"], "n-2"
        )
        == expected
    )
    assert capfd.readouterr().out == "n-2\n"
