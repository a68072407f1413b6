"""What each subcommand does; `__main__` only parses."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import re
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import local, ray_up
from cluster.doctor import OLDEST_SAFE_RAY, examine, release
from cluster.errors import ClusterError, last_line
from cluster.jobs import job_secrets, submission
from cluster.jobs.addresses import dashboard_address, is_loopback
from cluster.jobs.client import TERMINAL, Client, ServerError
from cluster.jobs.entry import command_of
from cluster.jobs.overview import Overview, job_row, overview, print_table
from cluster.jobs.paths import absolute_paths, shared_paths
from cluster.jobs.progress import BarStream
from cluster.jobs.tree import Tree, choose
from cluster.training import ray_train
from twotower import verbosity, version
from twotower.words import listed, one_line, pluralize

FULL_PERCENT = 95.0  # Ray places no work on a node with a fuller disk


def up(arguments: argparse.Namespace) -> int:
    """Start a cluster."""
    if arguments.config:
        return _ray("up", arguments)
    if arguments.nodes < 1 or arguments.cpus < 0 or arguments.stop_wait < 1:
        raise ClusterError("--nodes and --stop-wait must be 1 or more, --cpus 0 or more")
    options = local.LocalOptions(
        arguments.folder, arguments.dashboard_port, arguments.cpus, arguments.nodes, arguments.stop_wait
    )
    cluster = local.up(options)
    nodes = pluralize(len(cluster.nodes), "node")
    path = options.folder.resolve() / local.TOKEN_NAME
    _say(f"cluster of {nodes} at {cluster.address}; Ray address {cluster.gcs}; end it with `down`")
    _say(f"its token, for Ray's own commands: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={path}")
    return 0


def down(arguments: argparse.Namespace) -> int:
    """End a cluster."""
    if arguments.config:
        return _ray("down", arguments)
    cluster = local.down(arguments.folder)
    _say(f"ended the cluster at {cluster.address}" if cluster else f"no local cluster is running in {arguments.folder}")
    return 0


def _ray(verb: str, arguments: argparse.Namespace) -> int:
    """Ray's own `ray up` or `ray down` for CLUSTER.yaml; its exit code."""
    if arguments.local:
        raise ClusterError("give either --local or CLUSTER.yaml, not both")
    if not Path(arguments.config).is_file():
        example = "cluster/deploy/ray-cluster.yaml is an example"
        raise ClusterError(f"cluster file {arguments.config} does not exist; {example}")
    return ray_up.run(verb, Path(arguments.config), _say)


def _client(arguments: argparse.Namespace) -> Client:
    """The cluster that was named, with the token of the local cluster if it is that one."""
    address = dashboard_address(arguments.address)
    return Client(address, local.token_file(arguments.folder, address))


def submit(arguments: argparse.Namespace) -> int:
    """Run a command as a job."""
    words = command_of(arguments.entrypoint)
    if not words:
        raise ClusterError("submit: no command; expected: python -m cluster submit -- python -m pipeline prepare ...")
    address = dashboard_address(arguments.address)
    job_id = submission.new_job_id(words) if arguments.id is None else arguments.id
    submission.check_job_id(job_id)
    environment = _commit() | _environment(arguments.env)
    secrets = job_secrets.read_secrets(arguments.secret)
    if both := secrets.keys() & environment.keys():
        raise ClusterError(f"--secret {min(both)}: it is given with --env too, where everyone sees it; leave one out")
    tree = choose(include=arguments.include, untracked=arguments.untracked)
    if arguments.dry_run:
        return _list(tree)
    command = _wrapped(arguments, absolute_paths(words, address, is_loopback(address), tree.files))
    request = submission.JobRequest(command, job_id, tree, environment, arguments.python, secrets)
    if arguments.print:
        if secrets:
            raise ClusterError("--print: `ray job submit` has no --secret: leave one of the two out")
        print(request.ray_command(address))
        _say("warning: unlike `submit`, Ray's own command sends all that .gitignore does not name, also keys")
        return 0
    client = _client(arguments)
    _check_version(client)
    nodes = client.nodes()
    _check_disks(client, nodes)
    hosts = {str(node.get("hostname")) for node in nodes if node.get("raylet", {}).get("state") == "ALIVE"}
    here = is_loopback(address) and hosts <= {socket.gethostname()}  # else it is the end of a tunnel
    words = list(absolute_paths(words, address, here, tree.files))
    command = _wrapped(arguments, words)
    if len(hosts) > 1 and (paths := shared_paths(words)):
        command = ("python", "-m", "cluster.jobs.seen", *paths, "--", *command)
    request = dataclasses.replace(request, command=command)
    if not is_loopback(address) and address.startswith("http://"):
        _say(f"warning: {address} is not encrypted, so your token can be read on the way; use an SSH tunnel or https")
    _say_what_goes(tree)
    started = time.time()
    submission.submit(client, request)
    if arguments.no_wait:
        print(request.job_id)
        return 0
    _say(f"job {request.job_id} sent; follow it elsewhere: python -m cluster logs --follow {request.job_id}")
    return _follow(client, request.job_id, started)


def _say_what_goes(tree: Tree) -> None:
    _say(f"sends {tree}; --dry-run lists them")
    for line in tree.left_out:
        _say(f"warning: not sent: {one_line(line)}")
    if tree.unknown:
        some = ", ".join(map(one_line, tree.unknown[:3])) + (", ..." if len(tree.unknown) > 3 else "")
        files = f"{pluralize(len(tree.unknown), 'file')} that git does not know ({some})"
        _say(f"warning: not sent: {files}; `git add`, --include PATH or --untracked sends them")


def _list(tree: Tree) -> int:
    """What `submit` would send: bytes and name of every file, and the sum."""
    for name, size in zip(tree.files, tree.sizes, strict=True):
        print(f"{size:>10,}  {one_line(name)}")
    for line in tree.left_out:
        print(f"  not sent  {one_line(line)}")
    print(f"{tree} of {tree.folder}; nothing was sent")
    return 0


def _wrapped(arguments: argparse.Namespace, command: Sequence[str]) -> tuple[str, ...]:
    """The command as the job runs it: through Ray Train, on every node, or as it is."""
    words = ray_train.entrypoint(arguments, command)
    if not arguments.every_node:
        return words
    if arguments.towers or arguments.replicas:
        raise ClusterError("--every-node runs a command of its own on each node: leave --towers and --replicas out")
    return ("python", "-m", "cluster.jobs.every_node", "--", *words)


def _follow(client: Client, job_id: str, started: float | None = None) -> int:
    """Show the log to the end, say how the job ended and return its exit code.

    Args:
        client: the cluster.
        job_id: the job.
        started: when it was submitted, s since 1970; None if that is not known.

    Raises:
        OSError: nobody reads the log any more, or its disk is full; the job goes on, and a line says so.
    """
    stream = BarStream(sys.stdout.buffer) if sys.stdout.isatty() else sys.stdout.buffer
    goes_on = f"job {job_id} goes on; end it with `python -m cluster stop {job_id}`"
    try:
        job, follower = submission.wait(client, job_id, stream)
        if isinstance(stream, BarStream):
            stream.close()
    except KeyboardInterrupt:
        _say(f"\n{goes_on}")
        return 130
    except OSError:
        _say(goes_on)
        raise
    end = submission.ending(client, job)
    first = follower.first_byte_at if follower and started else None
    times = f"{((job.get('end_time') or 0) - (job.get('start_time') or 0)) / 1000:.1f} s"
    times += f", first log line {first - started:.1f} s after submit" if first and started else ""
    _say(f"job {job_id} {end} ({times})")
    return end.exit_code


def status(arguments: argparse.Namespace) -> int:
    """Show jobs, the newest first."""
    client = _client(arguments)
    if arguments.id:
        table = Overview((job_row(client, client.job(arguments.id)),), ())
    else:
        table = overview(client, client.jobs())
    if arguments.json:
        print(json.dumps(table.rows, indent=1))
    elif not table.rows:
        print(f"no jobs on {client.address}")
    else:
        print_table(table.rows)
    if table.silent:
        nodes = pluralize(len(table.silent), "node")
        lacking = "their jobs lack progress, or show the exit code that Ray supposes"
        _say(f"warning: {nodes} did not answer in time ({listed(table.silent)}): {lacking}")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """Show a job's log."""
    client = _client(arguments)
    job = client.job(arguments.id)
    job_id = job["submission_id"]
    if arguments.follow:
        return _follow(client, job_id)
    try:
        text = client.log(job_id, job.get("driver_node_id"))
    except ServerError:  # it has a node, and no file there yet
        text = client.log(job_id, None)
    if not text and not job.get("driver_node_id"):
        _say(f"job {one_line(job_id)} has written nothing: {one_line(last_line(job.get('message') or ''))}")
    sys.stdout.buffer.write(text)
    return 0


def stop(arguments: argparse.Namespace) -> int:
    """Stop a job and wait until it has ended."""
    client = _client(arguments)
    job = client.job(arguments.id)
    job_id = job["submission_id"]
    if job["status"] not in TERMINAL:
        client.stop(job_id)
        job, _ = submission.wait(client, job_id, None)
    end = submission.ending(client, job)
    _say(f"job {one_line(job_id)} {end}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Check the machine and the cluster."""
    findings = examine(dashboard_address(arguments.address), arguments.folder)
    if arguments.json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        for finding in findings:
            print(finding)
    return 2 if any(finding.level == "bad" for finding in findings) else 0


def _commit() -> dict[str, str]:
    """TWOTOWER_COMMIT for the job, whose copy of the tree has no history; nothing outside a checkout."""
    commit = version.find_commit()
    return {version.COMMIT: commit} if commit else {}


def _environment(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        name, _, value = pair.partition("=")
        if "=" not in pair or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
            raise ClusterError(f"--env {pair!r}: expected NAME=VALUE, the name of letters, digits and '_'")
    return dict(pair.split("=", 1) for pair in pairs)


def _check_version(client: Client) -> None:
    """Refuse a cluster whose Ray is older than the known holes or not the one that the project is pinned to here."""
    theirs, ours = client.version(), importlib.metadata.version("ray")
    if release(theirs) < OLDEST_SAFE_RAY:
        raise ClusterError(f"{client.address} runs Ray {theirs}, which has known remote holes: install {ours} there")
    if release(theirs) != release(ours):
        raise ClusterError(f"{client.address} runs Ray {theirs}, this machine {ours}: install the same version on both")


def _check_disks(client: Client, nodes: Sequence[dict[str, Any]]) -> None:
    """Refuse a cluster whose head has no room for the working tree and the logs; say it of other nodes."""
    for ip, is_head, mount, percent in full_disks(nodes):
        seen = f"disk {mount} of {'the head' if is_head else 'node'} {ip} is {percent:.0f} % full"
        if is_head:
            raise ClusterError(f"{seen}: the job could not start there; free some space")
        _say(f"warning: {seen}: Ray will place no work there")


def full_disks(nodes: Sequence[dict[str, Any]]) -> list[tuple[str, bool, str, float]]:
    """The disks that Ray calls full: address of the node, whether it is the head, mount, per cent."""
    found = []
    for node in nodes:
        raylet = node.get("raylet", {})
        for mount, usage in (node.get("disk") or {}).items():
            if raylet.get("state") == "ALIVE" and usage.get("percent", 0) >= FULL_PERCENT:
                found.append((str(node.get("ip")), bool(raylet.get("isHeadNode")), mount, float(usage["percent"])))
    return found


def _say(text: str) -> None:
    """Our own words go to stderr: stdout is the job's log. A quiet command has only its warnings."""
    with contextlib.suppress(OSError):  # nobody reads them any more
        if text.startswith("warning:"):
            print(text, file=sys.stderr, flush=True)
        else:
            verbosity.remark(text)
