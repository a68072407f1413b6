"""What is no option here: each is answered with what to type, in one line."""

import argparse
import collections
import os
from pathlib import Path

import pytest

from trainer.cli import make_parser
from trainer.config import load_config
from trainer.guesses import FIELDS, OPTIONS, PRECISION, recipe_fields
from trainer.parallel.world import World
from trainer.train_command import go_on_after_restart

PARSER = make_parser(collections.defaultdict(lambda: print))
(CHOICES,) = (action for action in PARSER._actions if isinstance(action, argparse._SubParsersAction))


def said(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        PARSER.parse_args(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("train --epochs 3", "--set train.epochs=3"),
        ("train --epochs=3 --data /d --run /r", "--set train.epochs=3"),
        ("train --data /d --run /r --lr 0.1", "--set optimizer.learning_rate=0.1"),
        ("train --batch-size 64", "--set train.batch_size=64"),
        ("train --batch_size 64", "--set train.batch_size=64"),
        ("bench --batch-size 64", "--set train.batch_size=64"),
        ("train --Epochs", "--set train.epochs=VALUE"),
        ("train --keep-checkpoint 3", "--set train.keep_checkpoints=3"),
        ("train --amp", "--set train.precision=bf16"),
        ("train --output runs/x", "here it is --run runs/x"),
        ("train --dataset d", "here it is --data d"),
        ("train --model alexnet", "here it is --config configs/paper.toml"),
        ("train --gpus 2", "here it is --processes 2"),
        ("train --gpu", "here it is --device cuda:0"),
        ("train --ckpt x", "here it is --resume auto"),
        ("train --skip_list x", "did you mean --skip-list?"),
        ("train --confi x", "did you mean --config?"),
        ("predict x.jpg --output y.html", "here it is --html y.html"),
        ("evaluate --rnu /r", "did you mean --run?"),
        ("export --out net.onnx", "did you mean --output?"),
    ],
)
def test_hints(words, hint, capsys):
    assert f": {hint}" in said(capsys, *words.split()).replace("a value of the recipe: ", "")


def test_no_hint_is_better_than_a_wrong_one(capsys):
    assert said(capsys, "evaluate", "--epochs", "3") == (
        "error: unknown option --epochs (see python -m trainer evaluate --help)"
    )


@pytest.mark.parametrize("name", [*recipe_fields(), *FIELDS, *PRECISION])
def test_every_hint_at_the_recipe_is_a_field_of_it(name, capsys):
    """Taken as it is hinted, with a value that the field's type refuses, it is named by the recipe's own check."""
    hint = said(capsys, "train", f"--{name}", "[[[]]]")
    field = hint.partition("--set ")[2].partition("=")[0]
    if not field:  # an option that has the same name
        assert f"--{name}" in CHOICES.choices["train"]._option_string_actions or "here it is" in hint
        return
    with pytest.raises(Exception, match=rf"{field}.* is .*expected|unknown") as refused:
        load_config(None, [f"{field}=[[[]]]"])
    assert "unknown field" not in str(refused.value)


def test_every_other_hint_is_an_option_that_train_or_predict_has():
    known = set(CHOICES.choices["train"]._option_string_actions) | set(
        CHOICES.choices["predict"]._option_string_actions
    )
    assert {words.split()[0].rstrip(",") for words in OPTIONS} <= known


@pytest.mark.parametrize("word", ["towr", "tower2", "bench-tow", "xyz", ""])
def test_a_hidden_command_is_not_offered(word, capsys):
    line = said(capsys, word)
    assert "tower" not in line.replace(repr(word), "")
    assert "tower" not in PARSER.format_help().replace("two-tower", "").replace("per tower", "").replace("towers", "")


@pytest.mark.parametrize("count", [None, "", "0", "1", "2"])
@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_command_that_is_started_again_wipes_nothing(variable, count, monkeypatch):
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    if count is not None:
        monkeypatch.setitem(os.environ, variable, count)
    arguments = argparse.Namespace(overwrite=True, resume="never", run=Path("/r"))
    go_on_after_restart(arguments, World(0, 2, 0, 2))
    again = count in ("1", "2")
    assert (arguments.overwrite, arguments.resume) == ((False, "auto") if again else (True, "never"))
    arguments = argparse.Namespace(overwrite=False, resume="/r", run=None)
    go_on_after_restart(arguments, World(0, 2, 0, 2))
    assert (arguments.overwrite, arguments.resume) == (False, "/r"), "the only word that names the run"


def test_a_count_of_restarts_that_torchrun_left_in_the_shell_means_nothing(monkeypatch):
    monkeypatch.setitem(os.environ, "TORCHELASTIC_RESTART_COUNT", "2")
    arguments = argparse.Namespace(overwrite=True, resume="never", run=Path("/r"))
    go_on_after_restart(arguments, None)
    assert arguments.overwrite
