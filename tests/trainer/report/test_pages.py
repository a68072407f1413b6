"""Thousands of images are several pages, linked, each written once it is full, the first last."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import RunError
from trainer.inference.neighbours import Neighbour, Neighbourhood, write_html
from trainer.inference.predict import html_pages
from trainer.inference.trained_net import ClassShare, FeatureRow, Prediction
from trainer.report import pages
from trainer.report.pages import Pages, Place


def draw(entries: Sequence[int], place: Place) -> str:
    return f"{list(entries)} {place.number} {place.first}-{place.last} <{place.before}|{place.after}>"


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, {"p.html": "[] 1 1-0 <|>"}),
        (3, {"p.html": "[0, 1, 2] 1 1-3 <|>"}),
        (4, {"p.html": "[0, 1, 2] 1 1-3 <|p-2.html>", "p-2.html": "[3] 2 4-4 <p.html|>"}),
    ],
)
def test_entries_are_dealt_to_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, expected: dict[str, str]
) -> None:
    monkeypatch.setattr(pages, "PER_PAGE", 3)
    written: Pages[int] = Pages(tmp_path / "p.html", draw)
    for number in range(count):
        written.add(number)
    assert not (tmp_path / "p.html").exists(), "the first page says that all are there"
    written.close()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected


def test_no_more_than_a_page_of_images_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PER_PAGE", 10)
    held: list[int] = []
    written: Pages[int] = Pages(tmp_path / "p.html", lambda entries, _: held.append(len(entries)) or "")
    for number in range(95):
        written.add(number)
    assert held == [10] * 9 and len(list(tmp_path.iterdir())) == 8
    written.close()
    assert held == [10] * 9 + [5] and len(list(tmp_path.iterdir())) == 10


def test_predictions_of_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image once, links both ways, what was refused at the end; one page is as it was, without links."""
    monkeypatch.setattr(pages, "PER_PAGE", 4)
    image = np.zeros((8, 8, 3), np.uint8)
    for count, names in ((4, ["p q.html"]), (9, ["p q.html", "p q-2.html", "p q-3.html"])):
        refused: list[Prediction] = []
        written = html_pages(tmp_path / "p q.html", tmp_path / "run", refused)
        for number in range(count):
            share = ClassShare(0, "cat", "cat", 0.5)
            written.add(Prediction(Path(f"i-{number}.png"), (share,), image))
        refused.append(Prediction(Path("bad.png"), error="is an empty file"))
        written.close()
        texts = [(tmp_path / name).read_text() for name in names]
        found = [name for text in texts for name in re.findall(r"<p title=\"(i-\d\.png)\"", text)]
        assert found == [f"i-{number}.png" for number in range(count)]
        assert ["is an empty file" in text for text in texts] == [False] * (len(texts) - 1) + [True]
    assert ['rel="next" href="p%20q-' in text for text in texts] == [True, True, False]
    assert ['rel="prev" href="p%20q' in text for text in texts] == [False, True, True]


def test_neighbours_of_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PER_PAGE", 2)
    rows = [FeatureRow(Path(f"i-{number}.png"), None, np.zeros((8, 8, 3), np.uint8)) for number in range(3)]
    found = [Neighbourhood(row, (Neighbour(rows[0], 1.0),)) for row in rows]
    write_html(tmp_path / "n.html", found, [FeatureRow(Path("bad.png"), error="damaged")], tmp_path, "fc7")
    first, second = ((tmp_path / name).read_text() for name in ("n.html", "n-2.html"))
    assert 'href="n-2.html"' in first and "damaged" not in first
    assert 'href="n.html"' in second and "damaged" in second


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    written: Pages[int] = Pages(tmp_path / "file" / "p.html", draw)
    with pytest.raises(RunError, match=r"--html .*p\.html cannot be written"):
        written.close()
