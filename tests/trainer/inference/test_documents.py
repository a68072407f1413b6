"""The example of docs/ runs as it stands, and the README's commands for own photos parse and need no edit."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.commands.prepare import add_parser
from tests.helpers.kept_run import make_kept_run
from tests.helpers.loader_data_set import photo_crop
from trainer.__main__ import HANDLERS
from trainer.cli import make_parser

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.usefixtures("one_thread")
def test_the_notebook_runs_as_a_script(tmp_path, monkeypatch, capsys):
    run, photos = make_kept_run(tmp_path / "kept"), tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        Image.fromarray(photo_crop(number, 96, 96, 3)).save(photos / f"{number}.png")
    words = ["look_inside.py", str(run), str(photos), str(tmp_path / "pictures")]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "docs" / "look_inside.py"))
    assert "kernels.png maps.png neighbours.png" in capsys.readouterr().out
    for name in ("kernels", "maps", "neighbours"):
        picture = Image.open(tmp_path / "pictures" / f"{name}.png").convert("L")
        low, high = picture.getextrema()
        assert high - low > 100, name  # something is drawn


def test_the_readmes_commands_for_own_photos_are_complete():
    """Three lines that can be copied: known options, a recipe that is there, no number that depends on the photos."""
    block = re.search(r"\*\*Your own photos\*\*.*?```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    prepare, train, predict = (shlex.split(line) for line in block.strip().splitlines())
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    made = parser.parse_args(prepare[3:])
    trained, said = (make_parser(HANDLERS).parse_args(words[3:]) for words in (train, predict))
    assert str(made.output) == str(trained.data) and trained.run == said.run
    assert trained.set == [] and (ROOT / trained.config).is_file()
