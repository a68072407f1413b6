"""The command line and its parts, without a cluster."""

import ast
import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import local
from cluster.__main__ import main
from cluster.commands import full_disks
from cluster.doctor import check_cluster
from cluster.errors import ClusterError, last_line
from cluster.host_checks import check_token
from cluster.jobs import client, submission
from cluster.jobs.auth_token import ensure_token, find_token, mode_too_wide, new_token, token_path
from cluster.jobs.client import Client

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")
COMMANDS = ("up", "down", "submit", "status", "logs", "stop", "doctor")
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing answers


@pytest.fixture(autouse=True)
def token_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "secret" / "token"))
    return tmp_path / "secret"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  python -m cluster {command}" in text


HEAVY = ("ray", "torch", "numpy", "rich", "nvidia", "pipeline", "trainer")
REFUSED = (
    ["sttus"],
    ["up", "--nodes", "x"],
    ["up", "--local", "--nodes", "0"],
    ["up", "nothing.yaml"],
    ["submit"],
    ["submit", "--replicas", "3:2", "--", "true"],
    ["submit", "--every-node", "--towers", "2", "--", "true"],
    ["submit", "--address", "http://10.0.0.7:1", "--", "python", "-m", "pipeline", "prepare", "--output", "x"],
    ["submit", "--address", NOBODY, "--", "true"],
    ["status", "--address", "ray://host:10001"],
)


@pytest.mark.parametrize("arguments", [["--help"], *REFUSED], ids=" ".join)
def test_help_typos_and_refused_options_load_nothing_heavy(arguments):
    """Ray alone takes half a second of processor time."""
    code = "import sys, cluster.jobs.entry, cluster.jobs.every_node\nfrom cluster.__main__ import main\n"
    code += f"try:\n    status = main({arguments!r})\nexcept SystemExit as end:\n    status = end.code\n"
    code += f"loaded = set({HEAVY!r}) & {{name.split('.')[0] for name in sys.modules}}\n"
    code += "sys.exit(f'loaded: {loaded}' if loaded else status)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if arguments == ["--help"] else 2), done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").rglob("*.py")), ids=lambda path: path.name)
def test_ray_is_imported_only_where_it_is_needed_and_then_inside_a_function(path):
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    rays = [node for node in imports if re.search(r"\bray\b", ast.unparse(node))]
    assert not rays or path.parent.name in ("jobs", "training")
    assert not set(rays) & set(tree.body)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "--address", NOBODY], "no Ray cluster at http://127.0.0.1:9"),
        (["status", "--address", "ray://host:10001"], "expected the dashboard as http://HOST:PORT"),
        (["status", "--address", "auto"], "expected the dashboard as http://HOST:PORT"),
        (["submit"], "no command"),
        (["submit", "--env", "X", "--", "true"], "expected NAME=VALUE"),
        (["up", "nothing.yaml"], "nothing.yaml does not exist"),
        (["up", "--nodes", "0"], "must be 1 or more"),
        (["down", "--local", "cluster.yaml"], "not both"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, words, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


@pytest.mark.parametrize(
    "words",
    [("submit", "--", "true"), ("status",), ("logs", "x"), ("stop", "x"), ("doctor",)],
    ids=lambda words: words[0],
)
def test_without_a_home_folder_it_names_the_variable(words, monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert main([words[0], "--address", NOBODY, *words[1:]]) == 2
    output = capsys.readouterr()
    assert "no home folder" in output.out + output.err and "RAY_AUTH_TOKEN_PATH" in output.out + output.err


def test_token_is_made_once_and_for_its_owner_only():
    old, path = os.umask(0), token_path()
    try:
        assert "new token" in ensure_token(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = find_token()
    assert re.fullmatch(r"[0-9a-f]{64}", token.text) and token.text not in repr(token)
    assert ensure_token(path) == "" and find_token() == token


def test_a_new_token_is_never_written_through_a_link(tmp_path):
    (tmp_path / "theirs").write_text("stays")
    (tmp_path / "token").symlink_to(tmp_path / "theirs")
    new_token(tmp_path / "token")
    assert (tmp_path / "theirs").read_text() == "stays" and not (tmp_path / "token").is_symlink()


def test_token_file_that_others_can_read_is_found_and_mended():
    path = token_path()
    new_token(path)
    path.chmod(0o644)  # as Ray writes it
    assert mode_too_wide(path) == 0o644
    (finding,) = check_token()
    assert finding.level == "bad" and finding.fix == f"chmod 600 {path}"
    assert ensure_token(path) and mode_too_wide(path) is None


def test_a_token_file_that_is_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "pipe"))
    with pytest.raises(ClusterError, match="it is no file"):
        Client(NOBODY)


def test_empty_token_file_is_named():
    path = token_path()
    new_token(path)
    path.write_text("\n")
    with pytest.raises(ClusterError, match="is empty"):
        Client(NOBODY)


@pytest.mark.parametrize(
    ("text", "line"),
    [("", "none"), ("Traceback\n  a\nValueError: no\n.", "ValueError: no"), (" x \n\n", "x"), ("y" * 400, "y" * 300)],
)
def test_the_reason_is_the_last_line_that_says_something(text, line):
    """Ray puts a full stop behind a server's traceback, on a line of its own."""
    assert last_line(text, "none") == line


Server = namedtuple("Server", "address handler")


@contextlib.contextmanager
def serving(answer):
    """A server on loopback; `answer(handler)` gives the body of each answer, and the handler's class takes settings."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = answer(self)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Server(f"http://127.0.0.1:{server.server_port}", Handler)
    server.shutdown()
    server.server_close()


@pytest.fixture
def open_dashboard():
    """A dashboard that asks nobody for a token."""
    with serving(lambda h: json.dumps([] if "jobs" in h.path else {"ray_version": h.ray_version}).encode()) as server:
        server.handler.ray_version = "2.40.0"
        yield server


def test_doctor_finds_an_open_cluster_and_an_old_ray(open_dashboard):
    findings = list(check_cluster(open_dashboard.address))
    assert [finding.level for finding in findings[:2]] == ["bad", "bad"]
    assert "RAY_AUTH_MODE=token" in findings[0].fix and "2.40.0" in findings[1].seen


@pytest.mark.parametrize(
    ("theirs", "words"),
    [("2.40.0", "runs Ray 2.40.0, which has known remote holes"), ("2.999.0", "install the same version on both")],
)
def test_submit_refuses_another_ray(open_dashboard, capsys, theirs, words):
    open_dashboard.handler.ray_version = theirs
    assert main(["submit", "--address", open_dashboard.address, "--", "true"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (["submit", "--", "true"], b"<html>a page</html>"),
        (["submit", "--", "true"], b'{"status": "ok"}'),
        (["status"], b"<html>a page</html>"),
    ],
)
def test_another_program_at_the_address_is_one_line(words, body, capsys):
    with serving(lambda handler: body) as server:
        assert main([words[0], "--address", server.address, *words[1:]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "is not a Ray dashboard" in lines[0]


def test_a_server_that_never_answers_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert main(["status", "--address", f"127.0.0.1:{silent.getsockname()[1]}"]) == 2
    assert "(no answer in time)" in capsys.readouterr().err


def test_contact_that_is_lost_ends_the_wait(monkeypatch):
    """A cluster that goes away while a job is followed; nothing answers at its address any more."""
    monkeypatch.setattr(submission, "LOST_CONTACT_S", 0.1)
    monkeypatch.setattr(submission, "POLL_S", 0.01)
    with pytest.raises(ClusterError, match="lost contact with the cluster while waiting for job-7: no Ray cluster at"):
        submission.wait(Client(NOBODY), "job-7", None)


def test_local_folder_too_long_for_sockets(tmp_path):
    with pytest.raises(ClusterError, match="40 characters"):
        local.up(local.LocalOptions(tmp_path / ("x" * 41)))


def test_node_ended_and_its_number_given_to_another_process_is_not_ours(tmp_path):
    ours = local.LocalNode(os.getpid(), started=1, head=True)
    local.save(tmp_path, local.LocalCluster(NOBODY, "127.0.0.1:1", (ours,)))
    assert local.load(tmp_path) is None
    local.stop_node(ours)  # must not end this very process
    assert local.down(tmp_path) is None


def test_the_port_of_the_local_cluster_must_be_one_of_its_processes(tmp_path, capsys):
    """A process in a session of its own stands for the head; then another program has the port."""
    code = "import socket, time\ns = socket.create_server(('127.0.0.1', 0))\n"
    code += "print(s.getsockname()[1], flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, local.PROGRAM]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as head,
        serving(lambda handler: b"{}") as other,
    ):
        try:
            node = local.LocalNode(head.pid, local._start_time(head.pid), head=True)
            ours = f"http://127.0.0.1:{int(head.stdout.readline())}"
            local.save(tmp_path, local.LocalCluster(ours, "127.0.0.1:1", (node,)))
            for address in (ours, ours.replace("127.0.0.1", "localhost")):
                assert local.token_file(tmp_path, address) == tmp_path / local.TOKEN_NAME
            for address in (other.address, "http://10.0.0.7:8265"):
                assert local.token_file(tmp_path, address) is None, "another cluster's"
            local.save(tmp_path, local.LocalCluster(other.address, "127.0.0.1:1", (node,)))
            assert main(["status", "--folder", str(tmp_path), "--address", other.address]) == 2
            assert "held by another program: the token was not sent" in capsys.readouterr().err
        finally:
            head.kill()
    assert local.token_file(tmp_path, other.address) is None, "its head has ended"


def test_full_disks_of_living_nodes():
    def node(ip, percent, state="ALIVE", head=False):
        return {"ip": ip, "disk": {"/": {"percent": percent}}, "raylet": {"state": state, "isHeadNode": head}}

    nodes = [node("a", 96.0, head=True), node("b", 94.9), node("c", 99.0, state="DEAD"), node("d", 100.0), {"ip": "e"}]
    assert full_disks(nodes) == [("a", True, "/", 96.0), ("d", False, "/", 100.0)]


def test_up_on_a_full_disk_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(local.shutil, "disk_usage", lambda place: Usage(100 << 30, 99 << 30, 5 << 20))
    assert main(["up", "--local", "--folder", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and "5 MiB free, and Ray needs 1 GiB" in lines[-1]
