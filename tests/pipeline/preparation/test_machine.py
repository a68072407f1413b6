"""What is wrong with a machine is one line that names the variable to set, before anything is written."""

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import OutputError, PipelineError
from pipeline.preparation import machine, ray_run
from pipeline.preparation.machine import LONGEST_NAME, check_machine, private_session, ray_folder
from pipeline.preparation.prepare import prepare
from pipeline.preparation.publish import staging_folder
from tests.helpers.local_cluster import ROOT, wait_until
from tests.helpers.strangers import strangers_port
from twotower import listeners


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable that says where Ray is."""
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS", *machine.TOKEN_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def options(folder: Path, **changes: Any) -> PrepareOptions:
    return PrepareOptions(**{"source": "digits", "output": folder / "data", "limit": 4, "workers": 1} | changes)


def line_of(call: Callable[[], object]) -> str:
    with pytest.raises(PipelineError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def a_file(folder: Path) -> str:
    (folder / "file").touch()
    return str(folder / "file")


FOLDERS = {
    "too long": (lambda folder: f"/tmp/{'x' * 35}", "40 bytes long, and the paths of Ray's sockets leave room for 30"),
    "too long in bytes": (lambda folder: f"/tmp/{'ü' * 18}", "41 bytes long"),
    "relative": (lambda folder: "tmp", "expected an absolute path"),
    "of the home": (lambda folder: "~/tmp", "expected an absolute path"),
    "not UTF-8": (lambda folder: os.fsdecode(b"/tmp/\xff"), r"/tmp/\xff: expected an absolute path in UTF-8"),
    "missing": (lambda folder: "/nowhere", "No such file or directory"),
    "a file": (a_file, "Not a directory"),
    "no sockets": (lambda folder: "/proc", "Ray cannot make its sockets there"),
}


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("fault", FOLDERS)
def test_a_folder_that_ray_cannot_use(
    fault: str, variable: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = FOLDERS[fault]
    short = Path("/tmp") / f"t{os.getpid()}"
    short.mkdir()
    try:
        monkeypatch.setenv(variable, make(short))
        text = line_of(lambda: prepare(options(tmp_path)))
    finally:
        for path in short.iterdir():
            path.unlink()
        short.rmdir()
    assert text.startswith(f"{variable} is ")
    assert words in text
    assert "set RAY_TMPDIR to" in text
    assert not (tmp_path / "data").exists()


def test_the_folder_that_ray_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own rules, but an empty variable is none: Ray would write into the working folder."""
    monkeypatch.setenv("TMPDIR", "")
    assert ray_folder() == Path("/tmp")
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/")
    assert ray_folder() == Path("/tmp")


def test_the_name_that_ray_appends() -> None:
    """The longest path that Ray would make, by its own rules, is as long as a socket's may be."""
    import ray._private.utils as utils

    utils.validate_socket_filepath("x" * (107 - len(LONGEST_NAME)) + LONGEST_NAME)
    with pytest.raises(OSError, match="107"):
        utils.validate_socket_filepath("x" * (108 - len(LONGEST_NAME)) + LONGEST_NAME)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999", "no.such.host.invalid:6379"]
)
def test_an_address_where_nobody_answers(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = line_of(lambda: prepare(options(tmp_path, address=address)))
    assert text.startswith(f"--address {address}: no Ray cluster answers there")
    monkeypatch.setenv("RAY_ADDRESS", address)
    text = line_of(lambda: prepare(options(tmp_path)))
    assert text.startswith(f"RAY_ADDRESS={address} (unset it to work on this machine alone): no Ray cluster answers")
    assert not (tmp_path / "data").exists()


def test_no_port_and_no_loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none_free(address: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(machine.socket, "create_server", none_free)
    assert line_of(lambda: check_machine(options(tmp_path))).startswith("no connection to 127.0.0.1 on this machine")


RAYS_ERRORS = [
    OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes"),
    PermissionError(13, "Permission denied", "/root/.ray"),
    Exception("The current node timed out during startup. This could happen\nbecause some of the raylet failed"),
    RuntimeError("Token authentication is enabled but no token was found"),
    ValueError("bad\nvalue"),
]


@pytest.mark.parametrize("error", RAYS_ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_ray_says_at_its_start_is_one_line_that_blames_no_output(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**arguments: Any) -> None:
        raise error

    monkeypatch.setattr(ray_run.ray, "init", init)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    text = line_of(lambda: prepare(options(tmp_path)))
    assert text.startswith("Ray does not start on this machine: ")
    assert "RAY_TMPDIR" in text
    assert str(tmp_path) not in text


def test_an_oserror_of_rays_in_the_middle_blames_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*arguments: Any, **options: Any) -> None:
        raise OSError(104, "Connection reset by peer")

    monkeypatch.setattr(ray_run.ray, "wait", wait)
    monkeypatch.setattr(ray_run.ray, "init", lambda **arguments: None)
    monkeypatch.setattr(ray_run.ray, "remote", lambda function: SimpleNamespace(options=lambda **words: _Remote()))
    monkeypatch.setattr(ray_run.ray, "put", lambda value: value)
    monkeypatch.setattr(ray_run.ray, "nodes", list)
    monkeypatch.setattr(ray_run.ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray_run, "Gauges", lambda *arguments: SimpleNamespace(update=lambda: None))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(PipelineError, match=r"^Ray failed \(\[Errno 104\] Connection reset by peer\)") as caught:
        prepare(options(tmp_path))
    assert not isinstance(caught.value, OutputError)


class _Remote:
    def remote(self, *arguments: object) -> object:
        return object()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_no_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_RAY_START_S", text)
    assert line_of(ray_run._start_limit_s).startswith(f"TWOTOWER_RAY_START_S is {text!r}: expected seconds")


def test_a_session_has_a_token_and_a_folder_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask, and whatever of other clusters the environment names; it needs no HOME."""
    monkeypatch.delenv("HOME", raising=False)
    for name, value in zip(machine.TOKEN_VARIABLES, ("disabled", "theirs", "/given"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "example.org")
    before, tokens = dict(os.environ), set()
    old = os.umask(0)
    try:
        for _ in range(2):
            with private_session() as session:
                assert "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ
                assert os.environ["no_proxy"].split(",") == ["example.org", "127.0.0.1", "localhost", "::1"]
                token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
                assert stat.S_IMODE(token.stat().st_mode) == 0o600
                assert stat.S_IMODE(session.folder.parent.stat().st_mode) == 0o700, "Ray makes its own folders 0777"
                tokens.add(token.read_text())
                session.folder.mkdir()
            assert not session.folder.parent.exists() and dict(os.environ) == before
    finally:
        os.umask(old)
    assert len(tokens) == 2 and {len(text) for text in tokens} == {64}


def test_the_files_of_a_ray_that_did_not_start_stay_but_not_its_token() -> None:
    with private_session() as session:
        session.folder.mkdir()
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        session.keep = True
    assert session.folder.exists() and not token.exists()
    shutil.rmtree(session.folder.parent)


@pytest.mark.skipif(os.getuid() != 0, reason="another user can only be played by root")
def test_a_cluster_of_another_user_of_this_machine_is_refused(tmp_path: Path) -> None:
    """Ray would send it the token, and run what it sends."""
    with strangers_port() as port:
        for address in (f"127.0.0.1:{port}", f"localhost:{port}", f"0.0.0.0:{port}"):
            text = line_of(lambda address=address: prepare(options(tmp_path, address=address)))
            assert text.startswith(f"--address {address}: ") and "another user of this machine (uid 65534)" in text


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="another user can only be played by root")
def test_nobody_else_on_the_machine_gets_into_a_running_prepare(tmp_path: Path) -> None:
    """Its Ray listens on loopback only, asks for a token, and its folder is shut; nothing is left behind."""
    marker, base = tmp_path / "reached", Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    base.chmod(0o777)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "TWOTOWER_FAULT": f"hold-driver-shard-done:{marker}",
        "RAY_TMPDIR": str(base),
        "HOME": str(tmp_path),
    }
    environment |= {"RAY_AUTH_MODE": "disabled"}
    words = ("prepare", "--source", "digits", "--limit", "40", "--shard-size", "8", "--workers", "1")
    command = [sys.executable, "-m", "pipeline", *words, "--output", str(tmp_path / "d")]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: marker.exists() or process.poll() is not None, "a shard is done")
            family = family_of(process.pid)
            inodes = {inode for pid in family for inode in listeners.inodes_of(pid)}
            ours = [one for one in listeners.listening() if one.inode in inodes]
            assert len(ours) > 5 and not [one for one in ours if not one.address.is_loopback]
            (private,) = base.iterdir()
            assert (private / "token").stat().st_mode & 0o777 == 0o600
            nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
            for words in (["ls", str(private)], ["cat", str(private / "token")], ["touch", str(private / "r" / "x")]):
                assert subprocess.run([*nobody, *words], capture_output=True, check=False).returncode != 0
            gcs = int(next((private / "r" / "session_latest").glob("gcs_server_port_*")).read_text())
            call = "grpc.insecure_channel(sys.argv[1]).unary_unary('/ray.rpc.InternalKVGcsService/InternalKVKeys')"
            code = f"import grpc, sys\ntry: {call}(b'', timeout=100, metadata=METADATA)\n"
            code += "except grpc.RpcError as error: print(error.code().name)"
            for metadata in ("[]", "[('authorization', 'Bearer 0')]"):
                command = [sys.executable, "-c", code.replace("METADATA", metadata), f"127.0.0.1:{gcs}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
                assert done.stdout == "UNAUTHENTICATED\n"
            assert not (tmp_path / ".ray").exists(), "no token for all clusters is left in HOME"
        finally:
            process.terminate()
            assert process.wait(60) == 143
    assert list(base.iterdir()) == []
    base.rmdir()


def family_of(pid: int) -> set[int]:
    """A process and all below it."""
    found, fresh = {pid}, {pid}
    while fresh:
        children: set[int] = set()
        for path in (path for one in fresh for path in Path(f"/proc/{one}/task").glob("*/children")):
            with contextlib.suppress(OSError):  # it has ended
                children |= set(map(int, path.read_text().split()))
        fresh = children - found
        found |= fresh
    return found


def test_no_home_to_stage_a_data_set_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nameless)
    monkeypatch.delenv("TWOTOWER_CACHE", raising=False)
    assert "set TWOTOWER_CACHE" in line_of(lambda: staging_folder("s3://bucket/data"))
