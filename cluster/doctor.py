"""`doctor`: the checks of a cluster. Every finding says what to do. Those of this machine are in host_checks.py."""

import socket
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import requests

from cluster import host_checks, local
from cluster.errors import ClusterError
from cluster.host_checks import Finding, bad, note, ok
from cluster.jobs.addresses import is_loopback
from cluster.jobs.client import Client, plain_session
from twotower.words import listed

CLOCK_TOLERANCE_S = 15.0  # a node's clock is reported every few seconds
OLDEST_SAFE_RAY = (2, 55)
HOLES = "CVE-2023-48022, CVE-2026-27482, GHSA-hhrp-gw25-jr43"


def examine(address: str, folder: Path) -> list[Finding]:
    """All findings, in a fixed order.

    Args:
        address: the dashboard.
        folder: the folder of the local cluster.
    """
    token = local.token_file(folder, address)
    findings = [*check_ray(), *host_checks.check_token(token), *check_cluster(address, token)]
    return [*findings, *check_binding(address, folder), *host_checks.check_host(folder)]


def release(text: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def check_ray() -> Iterator[Finding]:
    """Ray's version on this machine."""
    ours = version("ray")
    if release(ours) < OLDEST_SAFE_RAY:
        yield bad("ray", f"{ours} here has known holes ({HOLES})", "pip install -e . -c constraints.txt")
    else:
        yield ok("ray", f"{ours} here")


def check_cluster(address: str, token_file: Path | None = None) -> Iterator[Finding]:
    """Whether the cluster answers, asks for the token, runs the same Ray, and its clocks agree.

    A dashboard that answers without the token is not sent one, see `Client`.
    """
    try:
        status = _status_without_token(address)
    except requests.RequestException:
        yield note("cluster", f"nothing answers at {address}", "python -m cluster up --local, or give --address")
        yield from _check_port(address)
        return
    if status == 401:
        yield ok("cluster", f"{address} answers 401 without the token")
    else:
        fix = "anyone who reaches it can run code: restart it with RAY_AUTH_MODE=token (`up --local` does)"
        yield bad("cluster", f"{address} answers {status} without a token", fix)
    try:
        client = Client(address, token_file)
        yield from _check_version(client.version())
        yield from check_nodes(client.nodes())
    except (ClusterError, KeyError, ValueError) as error:
        yield bad("cluster", str(error), "mend this first: the checks of version and nodes need it")
    if not is_loopback(address) and address.startswith("http://"):
        fix = "use an SSH tunnel (ray dashboard CLUSTER.yaml) or https"
        yield bad("cluster", f"{address} is not encrypted: the token can be read on the way", fix)


def _status_without_token(address: str) -> int:
    with plain_session() as session:
        return session.get(f"{address}/api/jobs/", timeout=10, allow_redirects=False).status_code


def _check_port(address: str) -> Iterator[Finding]:
    url = urlparse(address)
    with socket.socket() as probe:
        probe.settimeout(3)
        taken = is_loopback(address) and probe.connect_ex(("127.0.0.1", url.port or 80)) == 0
    if taken:
        fix = f"find it with `ss -ltnp sport = :{url.port}`, or use another port: up --local --dashboard-port N"
        yield bad("port", f"{url.port} is taken by another program", fix)


def _check_version(theirs: str) -> Iterator[Finding]:
    ours = version("ray")
    fix = "install the same version on both: pip install -e . -c constraints.txt"
    if release(theirs) < OLDEST_SAFE_RAY:
        yield bad("cluster", f"runs Ray {theirs}, which has known holes ({HOLES})", fix)
    elif theirs != ours:
        yield bad("cluster", f"runs Ray {theirs}, this machine {ours}", fix)
    else:
        yield ok("cluster", f"runs Ray {theirs}")


def check_nodes(nodes: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """How many nodes live and were lost, and whether the clocks of the living agree.

    Args:
        nodes: the dashboard's summary of each node; `now` is its clock, in s since 1970.
    """
    alive = [node for node in nodes if node.get("raylet", {}).get("state") == "ALIVE"]
    lost = len(nodes) - len(alive)
    totals = [node["raylet"].get("resourcesTotal", {}) for node in alive]
    cpus, gpus = (sum(total.get(kind, 0) for total in totals) for kind in ("CPU", "GPU"))
    seen = f"{len(alive)} alive with {cpus:g} CPUs and {gpus:g} GPUs" + (f", {lost} lost" if lost else "")
    yield note("nodes", seen) if lost else ok("nodes", seen)
    clocks = {node["ip"]: float(node["now"]) for node in alive if "now" in node}
    if len(clocks) < 2:
        return
    apart = max(clocks.values()) - min(clocks.values())
    if apart > CLOCK_TOLERANCE_S:
        ahead, behind = max(clocks, key=clocks.__getitem__), min(clocks, key=clocks.__getitem__)
        yield bad(
            "clocks", f"{ahead} is {apart:.0f} s ahead of {behind}", "run chrony or systemd-timesyncd on all nodes"
        )
    else:
        yield ok("clocks", f"of {len(clocks)} nodes agree within {CLOCK_TOLERANCE_S:.0f} s")


def check_binding(address: str, folder: Path) -> Iterator[Finding]:
    """Whether all ports of the local cluster listen on loopback only."""
    cluster = local.load(folder)
    if cluster is None or cluster.address != address:
        return
    ports = host_checks.open_ports({pid for node in cluster.nodes for pid in local.session_members(node.pid)})
    if ports:
        fix = "whoever reaches this machine reaches them: `python -m cluster down`, then `up --local`"
        yield bad("ports", f"not on loopback only: {listed(sorted(ports))}", fix)
    else:
        yield ok("ports", "all of the local cluster's listen on loopback only")
