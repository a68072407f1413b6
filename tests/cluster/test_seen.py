"""A cluster whose second node has a host name and a disk of its own: what one node does not see is refused."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster import local
from cluster.jobs import loopback_node
from tests.helpers.local_cluster import Machine, started, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ALONE = ["unshare", "--mount", "--uts", "bash", "-c"]


@contextlib.contextmanager
def another_host(machine: Machine, own: str) -> Iterator[None]:
    """A node in namespaces of its own, where the folder `own` is another disk."""
    command = [*ALONE, f'mount -t tmpfs none {own} && hostname another-host && exec "$@"', "-"]
    command += [sys.executable, "-P", loopback_node.__file__, "--block", f"--address={machine.cluster.gcs}"]
    command += ["--num-cpus=1", "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    environment = local._environment(machine.options)
    with (
        (machine.folder / "second.log").open("wb") as log,
        subprocess.Popen(
            [*command, "--disable-usage-stats"],
            env=environment,
            cwd=machine.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        node = local.LocalNode(process.pid, local._start_time(process.pid), head=False)
        try:
            wait_until(lambda: "2 alive" in machine.run("doctor", *machine.place).stdout, "the second node")
            yield
        finally:
            local.stop_node(node)


def test_a_path_that_another_node_does_not_see_is_refused():
    if os.getuid() or subprocess.run([*ALONE, "mount -t tmpfs none /mnt"], check=False).returncode:
        pytest.skip("mounts of its own need root")
    with started(cpus=1) as machine:
        own, shared = machine.folder / "own", machine.folder / "shared"
        own.mkdir()
        shared.mkdir()
        describe = ("python", "-m", "trainer", "describe", "--config", "configs/digits.toml", "--svg")
        with another_host(machine, str(own)):
            relative = machine.run("submit", "--", *describe, "net.svg", expect=2)
            assert "--svg net.svg: give an absolute path that every node" in relative.stderr
            lost = machine.run("submit", "--", *describe, f"{own}/new/net.svg", expect=2)
            assert f"error: {own}/new/net.svg: node another-host (127.0.0.1) does not see it" in lost.stdout
            machine.run("submit", "--", *describe, f"{shared}/net.svg", expect=0)
        assert [path.name for path in shared.iterdir()] == ["net.svg"] and not list(own.iterdir())
