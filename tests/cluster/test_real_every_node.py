"""``submit --every-node`` on a cluster of two nodes: the command runs on each, and each knows its name."""

import pytest

from tests.helpers.local_cluster import started


@pytest.mark.slow
def test_a_command_runs_once_on_every_node_and_the_worst_exit_code_counts(tmp_path):
    code = "import os, sys; node = os.environ['TWOTOWER_NODE']\n"
    code += f"open({str(tmp_path)!r} + '/' + node, 'x').close(); sys.exit(3 if node.endswith('-2') else 0)"
    with started(cpus=1, nodes=2) as machine:
        done = machine.run("submit", "--every-node", "--id", "both", "--", "python", "-c", code, expect=3)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert len(names) == 2 and [name[-2:] for name in names] == ["-1", "-2"]  # two nodes of one host
        assert f"node {names[0]}: exit code 0" in done.stdout and f"node {names[1]}: exit code 3" in done.stdout
