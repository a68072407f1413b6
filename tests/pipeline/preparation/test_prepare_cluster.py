"""``prepare --address``: a Ray cluster of two nodes on this machine makes the same bytes, even when a node dies."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.preparation import faults
from tests.helpers.preparing import run, start, tree

pytestmark = pytest.mark.slow

Arguments = tuple[object, ...]


@pytest.fixture
def cluster() -> Iterator[object]:
    """Two nodes of one CPU each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 2**28}
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_two_nodes_make_the_same_bytes(
    cluster: object, arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=2**28)
    run(
        *arguments, "--address", cluster.address, "--output", tmp_path / "data", cwd=Path(__file__).resolve().parents[3]
    )
    assert tree(tmp_path / "data") == tree(undisturbed)


def test_a_lost_nodes_shards_are_made_elsewhere(
    cluster: object, arguments: Arguments, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is lost while one is half written there, and the other node has made some."""
    marker, records = tmp_path / "held", tmp_path / "data" / ".work" / "records"
    monkeypatch.setenv(faults.VARIABLE, f"hold-tar-half:{marker}")  # of the workers of this node
    node = cluster.add_node(num_cpus=1, object_store_memory=2**28)
    process = start(*arguments, "--address", cluster.address, "--output", tmp_path / "data")
    while not (marker.exists() and list(records.glob("*.json"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert tree(tmp_path / "data") == tree(undisturbed)


def test_a_wrong_address_is_one_line(arguments: Arguments, tmp_path: Path) -> None:
    done = run(*arguments, "--address", "127.0.0.1:1", "--output", tmp_path / "data", expect=2)
    assert "no Ray cluster answers there" in done.stderr
    assert "Traceback" not in done.stderr
