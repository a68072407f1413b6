"""Paths in a job's command: every option of every command is known, and none can name a file that gets lost."""

import argparse
import collections
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.errors import ClusterError
from cluster.jobs import paths, seen
from cluster.jobs.paths import OPTIONS, TREE, absolute_paths, options_of, path_words, shared_paths
from cluster.jobs.tree import choose
from pipeline.__main__ import make_parser as pipeline_parser
from trainer.cli import make_parser as trainer_parser

HERE, AWAY = "http://127.0.0.1:8265", "http://10.0.0.7:8265"
PARSERS = {"trainer": trainer_parser(collections.defaultdict(lambda: main)), "pipeline": pipeline_parser()}
NO_PATHS = {"--set", "--device", "--split", "--checkpoint", "--views", "--sample"}  # texts whose parser has no type


def subparsers(package: str) -> dict[str, argparse.ArgumentParser]:
    (found,) = [action for action in PARSERS[package]._actions if isinstance(action, argparse._SubParsersAction)]
    return found.choices


def with_values(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    actions = [action for action in parser._actions if action.nargs != 0]
    return {name: action for action in actions for name in action.option_strings or [action.dest]}


COMMANDS = [(package, name) for package in PARSERS for name in subparsers(package)]


def test_every_command_is_known():
    assert {(package, name) for package, names in OPTIONS.items() for name in names} == set(COMMANDS)


@pytest.mark.parametrize(("package", "name"), COMMANDS)
def test_every_option_with_a_value_is_known_and_every_path_is_one(package, name):
    known, parser = options_of(package, name), subparsers(package)[name]
    actions = with_values(parser)
    assert set(known) == set(actions)
    assert not parser.allow_abbrev, "an abbreviated option would not be recognized"
    for option, action in actions.items():
        assert known[option].count == str(action.nargs or 1)
        is_path = action.type is Path or "path" in getattr(action.type, "__name__", "").lower()
        text = action.type is None and action.choices is None and option not in NO_PATHS
        metavar = str(action.metavar or "")
        says_so = any(word in metavar for word in ("DIR", "FILE", "PATH", "PNG", "TOML", "FOLDER"))
        assert (known[option].kind != "none") >= (is_path or (text and says_so)), f"{option} is a path"
        assert (known[option].kind == "data") >= ("URL" in metavar), f"{option} may be a URL"


@pytest.mark.parametrize(("package", "name"), COMMANDS)
def test_every_relative_path_is_made_absolute_here_and_refused_elsewhere(package, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for option in options_of(package, name).values():
        if option.kind == "none":
            continue
        values = ["x/a.b", "c"][: 1 if option.count in ("1", "?") else 2]
        head = ["python", "-m", package, name, "--flag"]
        alone = not option.name.startswith("--")
        forms = [[*head, *values]] if alone else [[*head, option.name, *values], [*head, f"{option.name}=x/a.b"]]
        for words in forms:
            made = absolute_paths(words, HERE, here=True)
            assert made[5:] == tuple(
                word.replace("x/a.b", f"{tmp_path}/x/a.b") if word != "c" else f"{tmp_path}/c" for word in words[5:]
            )
            with pytest.raises(ClusterError, match="give an absolute path"):
                absolute_paths(words, AWAY, here=False)
            assert absolute_paths(made, AWAY, here=False) == made
            assert f"{tmp_path}/x/a.b" in shared_paths(made)


@pytest.mark.parametrize(
    "front",
    [
        ["python", "-u", "-m", "trainer"],
        ["env", "A=1", "/opt/python3", "-m", "trainer"],
        ["torchrun", "--nproc-per-node", "2", "-m", "--", "trainer"],
        ["python", "trainer/__main__.py"],
        ["python", "-m", "cluster.training.ray_train", "--towers", "2", "--", "python", "-m", "trainer"],
    ],
    ids=" ".join,
)
def test_a_command_is_found_behind_what_starts_it(front):
    with pytest.raises(ClusterError, match=r"--confusion c\.png: give an absolute path"):
        absolute_paths([*front, "evaluate", "--run", "/r", "--data", "/d", "--confusion", "c.png"], AWAY, here=False)


def test_flags_and_values_that_are_no_paths_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "python",
        "-m",
        "trainer",
        "predict",
        "a.jpg",
        "--json",
        "b.jpg",
        "--top",
        "3",
        "--run",
        "/r",
        "--",
        "c.jpg",
    ]
    made = absolute_paths(words, HERE, here=True)
    assert [word for word in made if word not in words] == [f"{tmp_path}/{name}.jpg" for name in "abc"]
    others = ["python", "my.py", "--output", "x", "--data=y"]
    assert absolute_paths(others, AWAY, here=False) == tuple(others)
    resume = ["python", "-m", "trainer", "train", "--resume", "auto", "--profile", "--set", "train.epochs=3"]
    assert absolute_paths(resume, AWAY, here=False) == tuple(resume)


def test_urls_are_for_data_only():
    words = ["python", "-m", "trainer", "evaluate", "--data", "s3://b/d", "--run", "/r"]
    assert absolute_paths(words, AWAY, here=False) == tuple(words) and shared_paths(words) == ["/r"]
    for value in ("s3://b/c.png", "file:///x/c.png", ""):
        with pytest.raises(ClusterError, match=r"--confusion .*expected a file or folder, as an absolute path"):
            absolute_paths([*words, "--confusion", value], HERE, here=True)


def test_a_recipe_may_be_a_file_of_the_tree_that_is_sent(monkeypatch, tmp_path):
    words = ["python", "-m", "trainer", "describe", "--config"]
    monkeypatch.chdir(TREE / "configs")
    sent = ("configs/digits.toml",)
    for value in ("digits.toml", "../configs/digits.toml", "configs/digits.toml"):
        assert absolute_paths([*words, value], AWAY, False, sent)[-1] == "configs/digits.toml"
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").touch()
    assert absolute_paths([*words, "mine.toml"], HERE, here=True)[-1] == f"{tmp_path}/mine.toml"
    with pytest.raises(ClusterError, match="the tree that is sent has no such file"):
        absolute_paths([*words, "mine.toml"], AWAY, here=False)


def test_a_recipe_that_is_left_out_of_what_is_sent_is_no_part_of_it(monkeypatch):
    """As a run's own, below runs/ (.gitignore), or one of the lists in benchmarks/results (.rayignore)."""
    left_out = next((TREE / "benchmarks" / "results").iterdir()).relative_to(TREE)
    monkeypatch.chdir(TREE)
    files = choose().files
    assert paths._in_sent_tree(Path("configs/digits.toml"), files) and not paths._in_sent_tree(left_out, files)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("python -m trainer evaluate --run /r --data /d --confusion c.png", True),
        ("cd /x && python -m trainer describe --svg net.svg; echo done", True),
        ("true\npython -m pipeline inspect /d --sheet a.png | tee log", True),
        ("python -m trainer describe --svg $OUT/net.svg > x.txt", False),
        ("python -m trainer train --config configs/digits.toml --data /d --run /r && ls x", False),
        ("echo trainer 'evaluate --run r", False),
    ],
)
def test_the_text_of_a_shell_is_read_but_not_rewritten(text, refused):
    words, sent = ["bash", "-c", text], ("configs/digits.toml",)
    if refused:
        with pytest.raises(ClusterError, match="give an absolute path"):
            absolute_paths(words, HERE, True, sent)
    else:
        assert absolute_paths(words, HERE, True, sent) == tuple(words)


def test_submit_refuses_before_anything_is_asked(capsys):
    words = ["python", "-m", "trainer", "evaluate", "--run", "/r", "--data", "/d", "--confusion", "c.png"]
    assert main(["submit", "--address", AWAY, "--print", "--", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --confusion c.png: give an absolute path that every node of {AWAY} can reach"


def test_a_path_that_one_node_does_not_see_is_named(monkeypatch, tmp_path):
    """Node b has a disk of its own where node a has the shared one."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "own").mkdir()

    def look(places):
        assert all(Path(place).exists() for place in places)
        return {"a": [], "b": [place for place in places if Path(place).parent.name == "own"]}

    monkeypatch.setattr(seen, "look_from_every_node", look)
    seen.check([f"{tmp_path}/shared/new/run"])
    with pytest.raises(ClusterError, match="own/new/run: node b does not see it; give a folder that every node"):
        seen.check([f"{tmp_path}/shared/new/run", f"{tmp_path}/own/new/run"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["own", "shared"], "the marks are taken away"


def test_what_is_seen():
    assert seen.nearest_folder(Path(f"{TREE}/no/such")) == TREE
    assert seen.unseen([str(TREE), "/no/such"]) == ["/no/such"]
    assert seen.marked("/proc/no/such", "x") == "/proc"
    assert path_words(["ls"]) == []
