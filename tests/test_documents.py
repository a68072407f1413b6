"""What the documents say of the code is so."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from trainer.planning.settings import settings_page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "trainer", "cluster", "twotower")
HOLE = "..."


def literals(path: Path) -> set[str]:
    """Every text of a file as the user sees it, ``...`` where a value stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
            found.add(re.sub(r"(\.\.\.){2,}", HOLE, "".join(map(str, parts))))  # two values side by side are one hole
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


TEXTS = [text for package in PACKAGES for path in (ROOT / package).rglob("*.py") for text in literals(path)]


def quoted_messages() -> list[str]:
    """The messages of docs/troubleshooting.md: what stands in backticks in the first column of its tables."""
    rows = [line for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    first = [row.split(" | ")[0] for row in rows if "not ours" not in row.split(" | ")[0]]
    return [message for cell in first for message in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("message", quoted_messages())
def test_every_quoted_message_is_one_of_the_code(message: str) -> None:
    said = message.removeprefix("error: ").removeprefix("warning: ")
    said = said.replace("was ended by SIGKILL", f"was ended by {HOLE}")
    assert any(said in text or said in text.removeprefix("error: ") for text in TEXTS), said


def test_there_are_messages_and_a_wrong_one_would_be_noticed() -> None:
    assert len(quoted_messages()) > 30
    assert not any("no data set folder in ...: make one" in text for text in TEXTS)


def test_the_page_of_settings_is_what_the_code_says() -> None:
    """``make docs`` writes it."""
    assert (ROOT / "docs" / "config.md").read_text() == settings_page()


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for path in ROOT.glob("docs/*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


def test_the_dockerfile_copies_what_is_there_and_every_package() -> None:
    for name in ("Dockerfile", "cluster/deploy/Dockerfile"):
        copies = re.findall(r"^COPY (.+) \S+$", (ROOT / name).read_text(), re.MULTILINE)
        copied = " ".join(copies).split()
        assert set(PACKAGES) <= set(copied) and all((ROOT / source).exists() for source in copied), name


def test_no_image_and_no_job_takes_the_environment_along() -> None:
    for name in (".dockerignore", ".rayignore"):
        assert any(line.startswith(".venv") for line in (ROOT / name).read_text().splitlines())


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(phony.split()) == {line.split()[0] for line in listed.splitlines()}
