"""``submit --every-node``: names of nodes, the wrapped command, exit codes."""

import pytest

from cluster.__main__ import main
from cluster.jobs import every_node
from cluster.jobs.submission import absolute_paths


def test_nodes_on_one_host_get_numbers():
    assert every_node.unique_names(["a", "b", "a"]) == ["a-1", "b", "a-2"]
    assert every_node.unique_names(["a"]) == ["a"]


def test_the_command_is_wrapped(capsys):
    command = ["--every-node", "--", "python", "-m", "trainer", "bench", "--synthetic"]
    assert main(["submit", "--address", "http://127.0.0.1:1", "--print", *command]) == 0
    assert "python -m cluster.jobs.every_node -- python -m trainer bench --synthetic" in capsys.readouterr().out


def test_every_node_and_towers_exclude_each_other(capsys):
    words = ["submit", "--address", "http://127.0.0.1:1", "--print", "--every-node", "--towers", "2", "--", "true"]
    assert main(words) == 2
    assert "leave --towers and --replicas out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "expected"), [("import sys; sys.exit(5)", 5), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_node_reports_the_exit_code_and_tells_the_command_its_name(code, expected, capfd):
    assert (
        every_node.run_here(
            ["python", "-c", f"import os; print(os.environ['TWOTOWER_NODE'], flush=True); {code}"], "n-2"
        )
        == expected
    )
    assert capfd.readouterr().out == "n-2\n"


def test_json_and_html_are_paths_only_where_a_value_follows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["python", "-m", "trainer", "bench", "--json", "x/{node}.json", "--html=y.html"]
    assert absolute_paths(words, "http://127.0.0.1:1")[-2:] == (
        f"{tmp_path}/x/{{node}}.json",
        f"--html={tmp_path}/y.html",
    )
    flag = ["python", "-m", "trainer", "evaluate", "--json", "--run", "/runs/one"]
    assert absolute_paths(flag, "http://127.0.0.1:1") == tuple(flag)
