"""What the three programs share: version, system, how much is said."""

import argparse
import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cluster.__main__
import pipeline.__main__
import trainer.__main__
from pipeline.progress import ProgressLine
from trainer.training.metrics import TrainingProgress
from twotower import __version__, verbosity, version
from twotower.words import pluralize

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("pipeline", "trainer", "cluster")
ELSEWHERE = """
import runpy, sys
sys.platform = {system!r}
sys.argv = [{package!r}, "--help"]
try:
    runpy.run_module({package!r}, run_name="__main__")
except SystemExit as end:
    print("STATUS", end.code, [name for name in ("fcntl", "argparse") if name in sys.modules])
"""


@pytest.fixture(autouse=True)
def level(monkeypatch):
    monkeypatch.setenv(verbosity.VARIABLE, "normal")  # and whatever a test makes of it is undone
    yield
    verbosity.log.handlers.clear()
    verbosity.log.setLevel(logging.CRITICAL)


def run_main(package: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [package, *words])
    try:
        return {"pipeline": pipeline, "trainer": trainer, "cluster": cluster}[package].__main__.main()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("package", PROGRAMS)
def test_each_program_tells_its_version(package, monkeypatch, capsys):
    assert run_main(package, "--version", monkeypatch=monkeypatch) == 0
    assert re.fullmatch(
        rf"twotower {re.escape(__version__)}(, commit [0-9a-f]{{12}}(\+changes)?)?\n", capsys.readouterr().out
    )


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "twotower.__version__"}
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_copy_without_history_has_not_the_commit_of_the_checkout_around_it(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(version, "ROOT", tmp_path / "copy")
    monkeypatch.delenv(version.COMMIT, raising=False)
    assert version.find_commit() == "" and version.describe() == f"twotower {__version__}"
    monkeypatch.setenv(version.COMMIT, "0123456789ab")  # as a job has it
    assert version.describe().endswith(", commit 0123456789ab")


def test_a_hook_of_another_repository_does_not_lend_its_commit(monkeypatch, tmp_path):
    found = version.find_commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert version.find_commit() == found


@pytest.mark.parametrize("package", PROGRAMS)
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_told_in_one_line_before_anything_is_imported(package, system):
    program = ELSEWHERE.format(system=system, package=package)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.fullmatch(rf"error: twotower runs on Linux only, .* {system}: .*\n", done.stderr), done.stderr
    assert done.stdout == "STATUS 2 []\n"


def parser_of(package: str) -> argparse.ArgumentParser:
    make = {"pipeline": pipeline.__main__.make_parser, "cluster": cluster.__main__._parser}.get(package)
    return make() if make else trainer.__main__.make_parser(trainer.__main__.HANDLERS)


@pytest.mark.parametrize("package", PROGRAMS)
def test_options_may_stand_before_or_after_the_command(package):
    command = {"pipeline": ["status", "x"], "trainer": ["describe"], "cluster": ["status"]}[package]
    for words in (["-q", *command], [*command, "--quiet"]):
        assert parser_of(package).parse_args(words).verbosity == "quiet"
    assert not hasattr(parser_of(package).parse_args(command), "verbosity")


@pytest.mark.parametrize("package", PROGRAMS)
def test_every_command_has_them(package):
    kind = argparse._SubParsersAction
    (commands,) = (action.choices for action in parser_of(package)._actions if isinstance(action, kind))
    for command in commands.values():
        assert {"--quiet", "--verbose"} <= command._option_string_actions.keys()


def test_quiet_leaves_out_progress_and_remarks_and_keeps_errors(monkeypatch, capsys, tmp_path):
    assert run_main("pipeline", "verify", "--quiet", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: ")
    verbosity.remark("note: nothing")
    monkeypatch.setattr("pipeline.progress.LINE_EVERY_S", 0.0)
    monkeypatch.setattr("trainer.training.metrics.PLAIN_LINE_EVERY_S", 0.0)
    ProgressLine(10).advance(1)
    progress = TrainingProgress(10, done=0, quiet=False)
    progress.say("20 epochs")
    progress.step({"step": 1, "epoch": 0, "loss": 1.0, "images_per_s": 1.0})
    assert capsys.readouterr() == ("", "")


def test_without_quiet_the_same_is_said(monkeypatch, capsys):
    verbosity.remark("note: something")
    monkeypatch.setattr("pipeline.progress.LINE_EVERY_S", 0.0)
    ProgressLine(10).advance(1)
    TrainingProgress(10, done=0, quiet=False).say("20 epochs")
    said = capsys.readouterr()
    assert said.out == "20 epochs\n" and said.err.splitlines()[0] == "note: something" and "1 / 10" in said.err


def test_verbose_says_when_and_where_on_stderr(monkeypatch, capsys, tmp_path):
    assert run_main("pipeline", "-v", "verify", str(tmp_path), monkeypatch=monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == "" and re.match(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[\d+\] the error arose here:\n", said.err
    )
    assert "in read_manifest" in said.err and said.err.splitlines()[-1].startswith("error: ")


def test_a_level_left_in_the_environment_works_or_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(verbosity.VARIABLE, "loud")
    assert run_main("pipeline", "verify", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == f"error: {verbosity.VARIABLE} is 'loud': expected one of quiet, normal, verbose\n"
    assert run_main("pipeline", "--verbose", "verify", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert "arose here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "step", "1 step"), (0, "step", "0 steps"), (1437, "image", "1,437 images"), (2, "class", "2 classes"),
     (2, "damaged index", "2 damaged indexes"), (1, "damaged index", "1 damaged index")],
)  # fmt: skip
def test_plurals(number, noun, text):
    assert pluralize(number, noun) == text
