"""docs/commands.md has one table of exit codes; all three packages keep to it."""

import re
import signal
import sys
from pathlib import Path

import pytest

import cluster.__main__ as cluster_main
import pipeline.__main__ as pipeline_main
import trainer.__main__ as trainer_main
from cluster import commands
from cluster.errors import ClusterError
from cluster.jobs import entry, submission
from cluster.training import pair
from pipeline.commands import prepare
from pipeline.errors import PipelineError
from trainer import cli
from trainer.errors import LostError, TrainerError
from twotower.words import MOST_OF_A_LINE

ROOT = Path(__file__).resolve().parents[1]
STOPS = {signal.SIGHUP: "SIGHUP", signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
TABLE = dict(re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE))


def test_every_code_of_ours_is_in_the_table():
    named = {
        prepare.LEFT_OUT: "left out images",
        **{128 + number: words for number, words in STOPS.items()},
        TrainerError.status: "something to fix",
        LostError.status: "another process of the run was lost",
        pair.LOST: "another process of the run was lost",
        pair.STOPPED: "stopped by a signal and has saved",
        submission.EXIT_LOST: "without telling how",
        entry.CANNOT_START: "is not there",
    }
    assert {code: words in TABLE[str(code)] for code, words in named.items()} == dict.fromkeys(named, True)


@pytest.mark.parametrize("package", [cli, pipeline_main, cluster_main], ids=["trainer", "pipeline", "cluster"])
def test_help_tells_no_other_codes(package):
    codes = re.findall(r"(?:^exit codes:|,|;) (\d+) (?!\+)", package.EXIT_CODES)
    assert codes and set(codes) <= set(TABLE) and "128 + N ended by signal N" in package.EXIT_CODES


def run(package: str, error: BaseException, monkeypatch, capsys) -> tuple[int, str]:
    """The exit code of `python -m PACKAGE`, whose command ends with an error; and what stderr says."""

    def fail(*_):
        raise error

    if isinstance(error, BrokenPipeError):
        for name in ("dup2", "open"):
            monkeypatch.setattr(f"os.{name}", lambda *_: 1)  # our own stdout is pytest's
        monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    if package == "trainer":
        monkeypatch.setitem(trainer_main.HANDLERS, "describe", fail)
        monkeypatch.setattr(sys, "argv", ["trainer", "describe"])
        code = trainer_main.main()
    elif package == "pipeline":
        monkeypatch.setattr("pipeline.commands.verify.run", fail)
        monkeypatch.setattr(sys, "argv", ["pipeline", "verify", "x"])
        code = pipeline_main.main()
    else:
        monkeypatch.setattr(commands, "status", fail)
        fail.__name__ = "status"
        code = cluster_main.main(["status"])
    return code, capsys.readouterr().err


MAINS = {"trainer": trainer_main, "pipeline": pipeline_main, "cluster": cluster_main}
ERRORS = {"trainer": TrainerError, "pipeline": PipelineError, "cluster": ClusterError}


@pytest.mark.parametrize("package", ERRORS)
def test_the_same_end_has_the_same_code(package, monkeypatch, capsys):
    code, said = run(package, ERRORS[package]("mend it"), monkeypatch, capsys)
    assert (code, said) == (2, "error: mend it\n") and "something to fix" in TABLE["2"]
    with pytest.raises(ZeroDivisionError):  # a bug of ours: Python's own 1
        run(package, ZeroDivisionError(), monkeypatch, capsys)


@pytest.mark.parametrize("package", ERRORS)
def test_no_error_is_a_million_characters(package, monkeypatch, capsys):
    """Whatever it names: the last net under all messages; what to do stands at the end."""
    text = ", ".join(f"train-{number:08d}" for number in range(100_000))
    code, said = run(package, ERRORS[package](f"{text}: run prepare again"), monkeypatch, capsys)
    assert code == 2 and len(said) < MOST_OF_A_LINE + 20
    assert said.startswith("error: train-00000000, ") and said.endswith(": run prepare again\n")


@pytest.mark.parametrize("package", ["trainer", "cluster"])
def test_ctrl_c_is_130(package, monkeypatch, capsys):
    """Of pipeline the signal itself decides: tests/pipeline/test_signals.py."""
    assert run(package, KeyboardInterrupt(), monkeypatch, capsys)[0] == 130


def test_a_job_whose_log_nobody_reads_is_141(monkeypatch, capsys):
    """Elsewhere output that nobody reads is dropped."""
    assert run("cluster", BrokenPipeError(), monkeypatch, capsys) == (141, "") and "nobody reads" in TABLE["141"]


@pytest.mark.parametrize("package", ERRORS)
@pytest.mark.parametrize("words", [[], ["nonsense"], ["--nonsense"]], ids=str)
def test_a_wrong_command_line_is_one_line_and_2(package, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [package, *words])
    with pytest.raises(SystemExit) as ended:
        MAINS[package].main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(f"(see python -m {package} --help)")
