"""Names that a stranger chose, on screens: no one of them is a line of its own, and none looks like another."""

import json
import logging
import sys

import pytest

from twotower import verbosity
from twotower.words import json_text, lines_of, one_line, shortened

HOSTILE = {
    "a\nerror: all is lost": r"a\nerror: all is lost",
    "a\r\nb\x0bc\x0cd\x85e\u2028f\u2029g": r"a\r\nb\x0bc\x0cd\x85e\u2028f\u2029g",
    "\x1b[2J\x1b]0;title\x07\x9b31m\x7f": r"\x1b[2J\x1b]0;title\x07\x9b31m\x7f",
    "cat\u202egpj.exe\u2066\u200f\u061c": r"cat\u202egpj.exe\u2066\u200f\u061c",
    "a\u200bb\ufeffc\u00add\u2800e\u3164f\ufe0fg\u034f": r"a\u200bb\ufeffc\xadd\u2800e\u3164f\ufe0fg\u034f",
    "tag\U000e0041 \U000e0100": r"tag\U000e0041 \U000e0100",
    "\udce9": r"\xe9",  # a byte of a path that is no UTF-8
}
HARMLESS = ("photo 1.jpg", "Größe", "犬", "كلب", "e\u0301t\u00e9", "a\\b", "'quoted' \"twice\"", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_not_seen_is_escaped(text: str) -> None:
    assert one_line(text) == HOSTILE[text]
    assert one_line(f"{text}\n") == HOSTILE[text] + r"\n"
    assert lines_of(f"{text}\n".replace("\n", " ") + "\nb") == one_line(text.replace("\n", " ") + " ") + "\nb"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_seen_stays(text: str) -> None:
    assert one_line(text) == text
    assert json_text([text]) == json.dumps([text], ensure_ascii=False)


@pytest.mark.parametrize("text", [*HOSTILE, *HARMLESS])
def test_json_for_a_screen_says_the_same(text: str) -> None:
    shown = json_text({text: [1, text]}, indent=1)
    assert json.loads(shown) == {text: [1, text]}
    assert all(one_line(line) == line for line in shown.split("\n")) or text == "\udce9"
    assert len(shown.split("\n")) == 6


def test_a_long_value_is_cut() -> None:
    assert shortened("x" * 10**7) == "'" + "x" * 56 + "..."
    assert shortened(12) == "12" and len(shortened([["x"] * 100] * 10**5)) == 60


def test_no_line_of_the_log_is_a_strangers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(verbosity.VARIABLE, "verbose")
    monkeypatch.setattr(verbosity.log, "handlers", [])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(verbosity._Lines("%(message)s"))
    verbosity.log.addHandler(handler)
    verbosity.log.setLevel(logging.DEBUG)
    try:
        raise ValueError("a\nerror: forged \x1b[2J")
    except ValueError:
        verbosity.log.debug("shard\nerror: forged", exc_info=True)
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == r"shard\nerror: forged" and rest and all(line.startswith("    ") for line in rest)
    assert "\x1b" not in "".join(rest)
    monkeypatch.delenv(verbosity.VARIABLE)
    verbosity.remark("a\nb")
    assert capsys.readouterr().err == "a\\nb\n"
