"""Every file of an input is stored, left out with a reason, or counted: on random trees with every oddity mixed in."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.inspection.verify import check_dataset
from pipeline.manifest import Manifest, read_manifest
from pipeline.sources.listing import printable
from tests.helpers.odd_trees import LOCKED, OddTree, make_odd_tree
from tests.helpers.preparing import KEEP, prepare_here, tree


@pytest.fixture(autouse=True)
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of this name cannot be listed, by root neither."""
    scandir = os.scandir

    def refusing(path: Path | int) -> Iterator[os.DirEntry[str]]:
        if isinstance(path, Path) and path.name == LOCKED:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)


def stored_classes(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Source -> class of every sample."""
    found = {}
    for split in manifest.splits.values():
        for shard in split.shards:
            with tarfile.open(folder / shard.name) as tar:
                rows = [json.load(tar.extractfile(name) or io.BytesIO()) for name in tar.getnames() if ".json" in name]
            found |= {row["source"]: row["class"] for row in rows}
    return found


def check(odd: OddTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepares a tree twice, and holds the result against the truth."""
    labels = () if odd.labels is None else ("--labels", odd.labels)
    outputs = [odd.root.parent / name for name in ("first", "second")]
    arguments = ("--source", "folder", "--input", odd.root, "--shard-size", 5, "--follow-links", *KEEP, *labels)
    expected = 3 if odd.bad or any("unreadable" in key for key in odd.passed_over) else 0
    for output in outputs:
        assert prepare_here(monkeypatch, *arguments, "--output", output) == expected
    manifest = read_manifest(outputs[0])
    assert stored_classes(outputs[0], manifest) == {printable(path): name for path, name in odd.classes.items()}
    lines = [json.loads(line) for line in (outputs[0] / "quarantine.jsonl").read_text().splitlines()]
    left_out = {line["source"]: line["class"] for line in lines if line["action"] == "left_out"}
    assert left_out == {printable(path): name for path, name in odd.bad.items()}
    found = Counter({(row.split, row.reason): row.count for row in manifest.passed_over})
    assert found == odd.passed_over
    no_file = sum(count for (_, reason), count in found.items() if "no such picture" in reason)
    assert manifest.num_found == odd.num_files() + no_file
    assert manifest.num_found == manifest.num_samples + manifest.num_left_out + manifest.num_passed_over
    assert check_dataset(outputs[0], manifest, level="full") == []
    assert tree(outputs[0]) == tree(outputs[1])


@pytest.mark.parametrize("seed", range(12))
def test_counts_add_up_and_classes_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    check(make_odd_tree(tmp_path / "in", seed), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_counts_add_up_for_many_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    check(make_odd_tree(tmp_path / "in", seed), monkeypatch)
