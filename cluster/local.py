"""A Ray cluster on this machine: a head, and more nodes if wanted. Each can be ended without touching another cluster.

`ray stop` ends every Ray process of the machine, also those of other clusters and of other people's tests. So each node
runs as `ray start --block` in a session of its own, and its process id and start time are written down.

/proc is read by hand, for it takes a few lines: psutil comes inside Ray only, whose import takes half a second.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cluster.errors import ClusterError, last_line
from cluster.jobs import loopback_node
from cluster.jobs.addresses import is_loopback
from cluster.jobs.auth_token import new_token
from cluster.jobs.client import Client, ServerError, Unreachable
from cluster.jobs.entry import write_json
from twotower import listeners, private, typed
from twotower.untrusted import parse_json

RECORD = "cluster.json"
PROGRAM = Path(loopback_node.__file__).name
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
EXTRA_NODE_STORE_BYTES = 1 << 30
NEEDED_BYTES = 1 << 30  # logs, the copy of the working tree, spilled objects
TOKEN_NAME = "token"  # of this one cluster: `up` makes it, `down` deletes it
LINGERING = b"ray::_AutoscalingCoordinatorActor"  # Ray Train's, after a job of it; a node would wait 30 s for its end


@dataclass(frozen=True)
class LocalNode:
    """One node.

    Attributes:
        pid: its first process, which leads a session.
        started: when that process began, in clock ticks since boot; tells it from a later process with the same id.
        head: whether the node is the cluster's head.
    """

    pid: int
    started: int
    head: bool


@dataclass(frozen=True)
class LocalCluster:
    """What `up --local` writes down for the other commands.

    Attributes:
        address: the dashboard, http://HOST:PORT.
        gcs: where Ray's nodes and drivers meet, HOST:PORT.
        nodes: the head first.
    """

    address: str
    gcs: str
    nodes: tuple[LocalNode, ...]


@dataclass(frozen=True)
class LocalOptions:
    """How a local cluster is made.

    Attributes:
        folder: sockets, logs and our record. It must be short: a socket's path may have 107 characters.
        dashboard_port: 0 picks a free one.
        num_cpus: CPUs per node; 0: all cores that this process may use, shared out between the nodes.
        num_nodes: nodes on this machine; with more than one, the loss of a node can be tried.
        stop_wait_s: how long a stopped job may take to save its work before SIGKILL.
    """

    folder: Path
    dashboard_port: int = 8265
    num_cpus: int = 0
    num_nodes: int = 1
    stop_wait_s: int = 60


def default_folder() -> Path:
    """The folder of this user's local cluster.

    Not in $XDG_RUNTIME_DIR, which is memory on most systems: logs and spilled objects would fill it.
    """
    return Path(tempfile.gettempdir()) / f"twotower-{os.getuid()}"


def up(options: LocalOptions) -> LocalCluster:
    """Start a cluster and wait until all its nodes answer.

    Raises:
        ClusterError: one is running already, a port is taken, or Ray does not start.
    """
    _prepare_folder(options.folder)
    if running := load(options.folder):
        raise ClusterError(f"a local cluster is running at {running.address}; end it with `python -m cluster down`")
    port = options.dashboard_port or listeners.free_ports(1)[0]
    if not _is_free(port):
        raise ClusterError(f"port {port} is taken by another program; choose another with --dashboard-port N (0: any)")
    new_token(options.folder / TOKEN_NAME)
    address = f"http://127.0.0.1:{port}"
    gcs_port, client_port = listeners.free_ports(2)
    gcs = f"{loopback_node.LOOPBACK}:{gcs_port}"
    head_arguments = [
        "--head",
        f"--port={gcs_port}",
        f"--ray-client-server-port={client_port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        f"--temp-dir={options.folder / 'ray'}",
    ]
    cluster = LocalCluster(address, gcs, (_start_node(options, head_arguments, 0),))
    save(options.folder, cluster)
    try:
        wait_for_nodes(options, cluster, 1)
        for number in range(1, options.num_nodes):
            cluster = add_node(options, cluster, number)
        wait_for_nodes(options, cluster, options.num_nodes)
    except BaseException:
        down(options.folder)
        (options.folder / TOKEN_NAME).unlink(missing_ok=True)  # also if the head is dead, which `down` passes over
        raise
    return cluster


def add_node(options: LocalOptions, cluster: LocalCluster, number: int) -> LocalCluster:
    """Start one more node on this machine and write it down; `number` names its log file."""
    # One log monitor a machine: with two, every line of a worker reaches the driver twice.
    arguments = [f"--address={cluster.gcs}", "--include-log-monitor=false"]
    arguments += [f"--object-store-memory={EXTRA_NODE_STORE_BYTES}"]
    cluster = LocalCluster(cluster.address, cluster.gcs, (*cluster.nodes, _start_node(options, arguments, number)))
    save(options.folder, cluster)
    return cluster


def down(folder: Path) -> LocalCluster | None:
    """End the cluster of a folder: every process of its nodes and no other.

    Returns:
        The cluster that was ended, or None if none was running.
    """
    cluster = load(folder)
    if cluster is None:
        return None
    stop_nodes(cluster.nodes)
    (folder / RECORD).unlink(missing_ok=True)
    (folder / TOKEN_NAME).unlink(missing_ok=True)
    return cluster


def token_file(folder: Path, address: str) -> Path | None:
    """The token of a folder's cluster, if that is the one at an address; None if it is another cluster's address.

    Raises:
        ClusterError: the cluster runs, and the port of its dashboard is another program's.
    """
    cluster = load(folder)
    if cluster is None or not is_loopback(address):
        return None
    port = urlsplit(cluster.address).port
    if port is None or urlsplit(address).port != port:
        return None
    ours = {inode for node in cluster.nodes for pid in session_members(node.pid) for inode in listeners.inodes_of(pid)}
    found = listeners.listeners_at(listeners.addresses_here(listeners.LOOPBACK), port)
    if any(one.inode not in ours for one in found):
        raise ClusterError(
            f"port {port} of the local cluster is held by another program: the token was not sent; "
            "`python -m cluster down`, then `up --local`"
        )
    return folder / TOKEN_NAME


def stop_node(node: LocalNode, kill: bool = False) -> None:
    """End one node, as :func:`stop_nodes` does; with ``kill`` as a failure of its machine would, without a word."""
    stop_nodes([node], kill=kill)


def stop_nodes(nodes: Sequence[LocalNode], *, kill: bool = False) -> None:
    """End nodes: SIGTERM to each `ray start --block`, which ends its children; SIGKILL to all that is left."""
    alive = [node for node in nodes if is_alive(node)]
    if not kill:
        for pid in (pid for node in alive for pid in session_members(node.pid)):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(LINGERING):
                    os.kill(pid, signal.SIGKILL)
        for node in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(map(is_alive, alive)) and time.monotonic() < deadline:
            time.sleep(0.1)
    for pid in (pid for node in alive for pid in session_members(node.pid)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def save(folder: Path, cluster: LocalCluster) -> None:
    """Write the record that `load` reads."""
    write_json(folder / RECORD, asdict(cluster))


def load(folder: Path) -> LocalCluster | None:
    """The cluster of a folder if its head is alive, else None.

    Raises:
        ClusterError: the folder or its record is not this user's alone, or the record is damaged: nobody is to say
            which processes we end, and where our token goes.
    """
    path = folder / RECORD
    if not os.path.lexists(path):
        return None
    try:
        private.check_folder(folder)
        cluster: LocalCluster = typed.build(LocalCluster, parse_json(private.read_record(path)))
    except OSError as error:
        raise ClusterError(f"{path} cannot be read: {error.strerror or error}") from None
    except private.NotPrivateError as error:
        raise ClusterError(
            f"{error}: it is not believed; remove it, or choose another folder with --folder DIR"
        ) from None
    except ValueError as error:
        raise ClusterError(
            f"{path} is damaged ({error}): end the cluster's processes yourself, and remove it"
        ) from None
    return cluster if cluster.nodes and is_alive(cluster.nodes[0]) else None


def _prepare_folder(folder: Path) -> None:
    """Make the folder and shut everyone else out of it: Ray's own folders below are world-writable.

    Raises:
        ClusterError: the folder cannot be made, is somebody else's, is on a full disk, or has too long a path.
    """
    try:
        private.make_folder(folder)
    except private.NotPrivateError as error:
        raise ClusterError(f"{error}; choose another with --folder DIR") from None
    except OSError as error:
        raise ClusterError(f"folder {folder}: {error.strerror}; choose another with --folder DIR") from error
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise ClusterError(
            f"folder {folder} has {free >> 20} MiB free, and Ray needs 1 GiB; choose another with --folder"
        )
    if len(str(folder.resolve())) > 40:
        raise ClusterError(
            f"folder {folder} has a path of more than 40 characters: too long for Ray's sockets; shorten it"
        )


def _start_node(options: LocalOptions, arguments: list[str], number: int) -> LocalNode:
    num_cpus = options.num_cpus or max(1, len(os.sched_getaffinity(0)) // options.num_nodes)
    command = [sys.executable, "-P", loopback_node.__file__, "--block", f"--num-cpus={num_cpus}"]
    # Port 0 is "any free port": with Ray's fixed defaults a second cluster or node on a machine fails to start.
    command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--disable-usage-stats", *arguments]
    with _node_log(options.folder, number).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(options),
            cwd=options.folder,
            start_new_session=True,
        )
    return LocalNode(process.pid, _start_time(process.pid), head="--head" in arguments)


def _environment(options: LocalOptions) -> dict[str, str]:
    left_out = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= listeners.no_proxy_here(environment) | {"RAY_AUTH_MODE": "token"}
    environment["RAY_AUTH_TOKEN_PATH"] = str((options.folder / TOKEN_NAME).resolve())
    # Read by the job's supervisor on the cluster's side; the default of 3 s is too short to save a checkpoint.
    environment["RAY_JOB_STOP_WAIT_TIME_S"] = str(options.stop_wait_s)
    # A job's `python` is looked up in the head's PATH: make it the interpreter that has the project's packages.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return environment


def wait_for_nodes(options: LocalOptions, cluster: LocalCluster, wanted: int) -> None:
    """Wait until the dashboard knows `wanted` living nodes.

    Raises:
        ClusterError: the newest node has ended, or the nodes do not come in time.
    """
    client = Client(cluster.address, options.folder / TOKEN_NAME)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if not is_alive(cluster.nodes[-1]):
            log = _node_log(options.folder, len(cluster.nodes) - 1)
            said = last_line(log.read_text(errors="replace"), "no output")
            raise ClusterError(f"Ray did not start: {said} (all of it: {log})")
        with contextlib.suppress(Unreachable, ServerError, KeyError, ValueError):
            alive = [node for node in client.nodes() if node.get("raylet", {}).get("state") == "ALIVE"]
            if len(alive) >= wanted:
                return
        time.sleep(0.3)
    logs = _node_log(options.folder, 0)
    raise ClusterError(
        f"Ray did not answer at {cluster.address} within {START_TIMEOUT_S:.0f} s; its output is in {logs}"
    )


def _node_log(folder: Path, number: int) -> Path:
    return folder / f"node-{number}.log"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name: state, parent, group, session, ...; [] if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _start_time(pid: int) -> int:
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else 0


def is_alive(node: LocalNode) -> bool:
    """Whether the node's first process lives, and is that one: by its start, its user and its command."""
    fields = _stat_fields(node.pid)
    return bool(fields) and fields[0] != "Z" and int(fields[19]) == node.started and _is_ours(node.pid)


def _is_ours(pid: int) -> bool:
    """Whether a process is of this user, and runs our way to start a node."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        owner = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return False
    return owner == os.geteuid() and PROGRAM.encode() in command


def session_members(session: int) -> list[int]:
    """The living processes of a session: all that a node started, except those that left it."""
    if session <= 1:
        return []
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    fields = {pid: _stat_fields(pid) for pid in pids}
    return [pid for pid, stat in fields.items() if stat and stat[0] != "Z" and int(stat[3]) == session]
