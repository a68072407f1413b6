"""Towers among other users and programs of the machine: where they meet, and who answers in a tower's place."""

import ast
import contextlib
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.pair import run_mesh
from trainer.errors import PeerError
from trainer.parallel import proof
from trainer.parallel.mesh import FailureStore, Mesh, connect
from twotower.meeting import SECRET, STORE, meeting_place

ROOT = Path(__file__).resolve().parents[3]
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


def listening(process: int) -> list[str]:
    """The addresses at which a process listens for TCP, from /proc: hexadecimal, ``0100007F:PORT``."""
    inodes = set()
    for path in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            inodes.add(str(path.readlink()))
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


def what_listens(mesh: Mesh) -> list[str]:
    """Tower a also looks at the process that started both."""
    mesh.link.control([1, 2, 3])
    return listening(os.getpid()) + (listening(os.getppid()) if mesh.coord.rank == 0 else [])


@pytest.mark.slow
def test_towers_of_one_machine_listen_on_loopback_only() -> None:
    """All that is open while two pairs are connected: gloo's own sockets, at 127.0.0.1."""
    before = set(listening(os.getpid()))
    found = {address for addresses in run_mesh(what_listens, replicas=2) for address in addresses} - before
    assert found, "gloo listens"
    assert {address.partition(":")[0] for address in found} == {"0100007F"}, found


def test_the_meeting_place_is_of_this_user_alone() -> None:
    """The file, its folder, and that both are gone afterwards."""
    with meeting_place() as meeting:
        path = Path(meeting[STORE])
        dist.FileStore(str(path)).set("x", "y")
        found = path.parent.lstat()
        assert stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.geteuid() and len(meeting[SECRET]) == 64
        if os.geteuid() == 0:
            for words in (["cat", path], ["ls", path.parent], ["touch", path.parent / "x"]):
                done = subprocess.run([*NOBODY, *map(str, words)], capture_output=True, text=True, check=False)
                assert done.returncode and "Permission denied" in done.stderr
    assert not path.parent.exists()


def join_as_stranger(secret: str, store: str) -> str:
    """Answers in the place of rank 1, with what was found out of the store's path, and whatever secret."""
    words = {"RANK": "1", "WORLD_SIZE": "2", SECRET: secret, STORE: store, "GLOO_SOCKET_IFNAME": "lo"}
    program = (
        "from tests.trainer.parallel import test_strangers as t; from trainer.parallel import mesh, proof\n"
        "mesh.store_prefix = lambda start: t.prefix_of(start)\n"
        "try: mesh.connect(60.0, 'gloo'); print('let in')\n"
        "except mesh.PeerError as error: print(error)\n"
    )
    environment = os.environ | words | {"STOLEN": proof.store_prefix("0"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def prefix_of(start: str) -> str:
    """The keys of the store can be listed by whoever reaches it: the stranger has seen them."""
    return os.environ["STOLEN"]


@pytest.mark.slow
def test_who_does_not_know_the_secret_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger who has got as far as gloo's connection: tower a ends before it has sent anything else."""
    with meeting_place() as meeting:
        for name, value in (meeting | {"RANK": "0", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}).items():
            monkeypatch.setenv(name, value)
        environment = dict(os.environ)
        program = "from trainer.parallel.mesh import connect; connect(60.0, 'gloo')"
        words = [sys.executable, "-c", program]
        tower_a = subprocess.Popen(words, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        said_to_stranger = join_as_stranger("guessed", meeting[STORE])
        said = tower_a.communicate(timeout=100)[1]
    assert tower_a.returncode and "process 1 does not know the secret of this run" in said, said
    assert "let in" not in said_to_stranger  # how he ends depends on when tower a does
    assert meeting[SECRET] not in said_to_stranger + said


def test_another_secret_does_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of a start lie under a name that only the secret gives."""
    prefixes = set()
    for secret in ("", "one", "two"):
        monkeypatch.setenv(SECRET, secret)
        prefixes.add(proof.store_prefix("0"))
        assert not secret or secret not in proof.store_prefix("0"), "the secret itself is nowhere in the store"
    assert len(prefixes) == 3


def test_a_store_in_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As whoever sets our environment, or is first at a name that can be guessed, would have it."""
    open_folder, link = tmp_path / "open", tmp_path / "link"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    link.symlink_to(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for folder, why in ((open_folder, "has mode 0777"), (link, "is a link"), (tmp_path / "none", "No such file")):
        monkeypatch.setenv(STORE, str(folder / "store"))
        with pytest.raises(PeerError, match=why):
            connect(1.0, "gloo")
        assert not (folder / "store").exists()


def heard(monkeypatch: pytest.MonkeyPatch, theirs: bytes, length: int | None = None) -> list[object]:
    """What all_gather_json makes of another process's bytes."""

    def gather(mine: bytes, group: object) -> list[bytes]:
        if len(mine) == 8:
            return [mine, (len(theirs) if length is None else length).to_bytes(8, "little")]
        most = max(len(mine), len(theirs))
        return [mine.ljust(most), theirs.ljust(most)]

    monkeypatch.setattr(proof, "all_gather_bytes", gather)
    return proof.all_gather_json([1], None)


@pytest.mark.parametrize(
    "theirs", [pickle.dumps(print), b"[" * 100_000, b"\x1b[2J", b"\xff\xfe", b"", b"[2]\nerror: forged"]
)
def test_what_is_no_json_is_one_line(theirs: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle runs nowhere; depth and signs of terminals stay in one line."""
    with pytest.raises(PeerError, match="process 1 does not tell JSON") as refused:
        heard(monkeypatch, theirs)
    assert str(refused.value).isprintable()


def test_nobody_makes_us_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says that 2^60 bytes come is refused before they are waited for."""
    assert heard(monkeypatch, b"[2]") == [[1], [2]]
    with pytest.raises(PeerError, match=f"would send {1 << 60} bytes"):
        heard(monkeypatch, b"[2]", length=1 << 60)


def test_a_failure_that_somebody_wrote_stays_in_its_line() -> None:
    """The store's values are bytes of anybody who reaches it."""
    store = dist.HashStore()
    store.set("twotower/failure", "x\nerror: forged \x1b[31m" + "y" * 10_000)
    said = str(FailureStore(store).lost("mine"))
    assert said.startswith(r"x\nerror: forged \x1b[31m") and said.isprintable() and len(said) <= 2000


def test_nothing_is_unpickled_between_processes() -> None:
    """No name of a function of torch or Python that reads a pickle is in the packages' code.

    But where weights of other programs are read: torch's with ``weights_only``, those of 2012 by a reader that calls
    nothing (``tests/trainer/inference``).
    """
    allowed = {"trainer/model/weight_files.py", "trainer/model/files_2012.py"}
    forbidden = {
        "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
        "recv_object_list", "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "rpc",
    }  # fmt: skip
    found = []
    paths = [path for package in ("trainer", "twotower", "cluster") for path in (ROOT / package).rglob("*.py")]
    for path in (path for path in paths if str(path.relative_to(ROOT)) not in allowed):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "module", "") or ""}
            names |= {alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names & forbidden]
    assert not found, found
