"""A cluster that grows: a head without CPUs, and Ray's own autoscaler with its provider of local processes."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as HEAD_NODE

from cluster import local
from cluster.jobs.auth_token import new_token
from tests.helpers.digits_jobs import PREPARE, manifest, train_command
from tests.helpers.local_cluster import ROOT, Machine
from twotower import listeners

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROVIDER = "tests.helpers.fake_provider.Provider"
EMPTY_LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "rsync_exclude",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_filter",
)  # fmt: skip
NODE = {"CPU": 2, "memory": 2 << 30, "object_store_memory": 256 << 20}


def autoscaling_config(gcs: str) -> dict:
    """What `ray up` would hand to the head."""
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    node = {"resources": NODE, "node_config": {}, "min_workers": 0, "max_workers": 1}
    provider = {"type": "external", "module": PROVIDER, "gcs_address": gcs, "head_node_id": HEAD_NODE}
    provider |= {"launch_multiple": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    return {
        "cluster_name": "fake",
        "max_workers": 1,
        "provider": provider,
        "available_node_types": {"ray.head.default": head, "node": node},
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 60,
        "upscaling_speed": 1.0,
        **{name: {} for name in ("docker", "auth", "file_mounts")},
        **{name: [] for name in EMPTY_LISTS},
    }


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A head that has no CPU itself."""
    folder = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp"))
    options = local.LocalOptions(folder / "c", num_cpus=1)
    options.folder.mkdir(mode=0o700)
    names = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    names |= {"RAY_CLOUD_INSTANCE_ID": HEAD_NODE, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    original = local._environment
    monkeypatch.setattr(local, "_environment", lambda options: original(options) | {"PYTHONPATH": str(ROOT)})
    token = options.folder / local.TOKEN_NAME
    new_token(token)
    gcs_port, client_port, port = listeners.free_ports(3)
    gcs = f"127.0.0.1:{gcs_port}"
    (folder / "config.json").write_text(json.dumps(autoscaling_config(gcs)))
    arguments = ["--head", f"--port={gcs_port}", f"--ray-client-server-port={client_port}", "--num-cpus=0"]
    arguments += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--temp-dir={options.folder / 'ray'}"]
    arguments += [f"--autoscaling-config={folder / 'config.json'}"]
    try:
        node = local._start_node(options, arguments, 0)
        cluster = local.LocalCluster(f"http://127.0.0.1:{port}", gcs, (node,))
        local.save(options.folder, cluster)
        local.wait_for_nodes(options, cluster, 1)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_API_SERVER_ADDRESS": cluster.address}
        yield Machine(folder, options, environment)
    finally:
        local.down(options.folder)
        shutil.rmtree(folder, ignore_errors=True)


def test_prepare_asks_for_a_node_and_uses_it(machine: Machine, digits: Path, tmp_path: Path) -> None:
    words = ("python", *PREPARE, "--shard-size", "128", "--output", str(tmp_path / "d"), "--address", "auto")
    done = machine.run("submit", "--", *words, expect=0)
    assert "1,797 images" in done.stdout
    assert manifest(tmp_path / "d") == manifest(digits)


def test_training_asks_for_a_node_and_trains_there(machine: Machine, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--towers", "2", "--wait", "300")
    done = machine.run("submit", *options, "--", *train_command(digits, run, "--set", "train.epochs=1"), expect=0)
    assert "waiting for resources: 0/1 pairs fit" in done.stdout
    assert json.loads((run / "result.json").read_text())["exit_reason"] == "finished"
