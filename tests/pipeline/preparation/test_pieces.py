"""A shard made in pieces has the bytes of one made whole, and the last shards of a run are cut so that none waits."""

from pathlib import Path

import pytest

from pipeline.errors import OutputError, SourceError
from pipeline.preparation import pieces
from pipeline.preparation.pieces import build_piece, cut, join_pieces, num_pieces, remove_pieces
from pipeline.preparation.shard import ShardJob, ShardResult, ShardTask, build_shard
from tests.helpers.preparing import run, tree
from tests.helpers.shard_data import MemorySource, make_job, make_tasks


def build_in_pieces(job: ShardJob, task: ShardTask, count: int) -> ShardResult:
    result = join_pieces(job, task, *(build_piece(job, part) for part in cut(task, count)))
    remove_pieces(job, task)
    return result


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 11, 13])
def test_pieces_give_the_same_bytes(count: int, bad: int, split: str, tmp_path: Path) -> None:
    """More pieces than images too, and with an image that is left out."""
    task = make_tasks(22, 11, split)[1]
    whole = build_shard(make_job(tmp_path / "whole", MemorySource(bad)), task)
    assert build_in_pieces(make_job(tmp_path / "pieces", MemorySource(bad)), task, count) == whole
    assert tree(tmp_path / "pieces") == tree(tmp_path / "whole")


def test_a_shard_without_any_usable_image_in_pieces(tmp_path: Path) -> None:
    task = make_tasks(1, 1)[0]
    whole = build_shard(make_job(tmp_path / "whole", MemorySource(0)), task)
    assert build_in_pieces(make_job(tmp_path / "pieces", MemorySource(0)), task, 2) == whole
    assert tree(tmp_path / "pieces") == tree(tmp_path / "whole")


def test_joining_again_after_a_kill_needs_the_pieces_and_has_them(tmp_path: Path) -> None:
    job, task = make_job(tmp_path), make_tasks(9, 9)[0]
    parts = [build_piece(job, part) for part in cut(task, 3)]
    assert join_pieces(job, task, *parts) == join_pieces(job, task, *parts)
    remove_pieces(job, task)
    assert list((tmp_path / ".work" / "tmp").iterdir()) == []
    with pytest.raises(OutputError, match="cannot write"):
        join_pieces(job, task, *parts)


def test_a_piece_keeps_its_error_and_leaves_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path, MemorySource(0))
    strict = ShardJob(job.output, job.source, job.image, job.class_names, fail_on_error=True)
    with pytest.raises(SourceError, match="not an image"):
        build_piece(strict, make_tasks(1, 1)[0])
    assert list((tmp_path / ".work" / "tmp").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2, 3, 16, 100])
@pytest.mark.parametrize("num_shards", [1, 2, 16, 17, 31, 129])
def test_no_worker_waits_for_a_whole_shard(num_shards: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work handed to whoever is free first takes at most a quarter of a share longer than it must."""
    task = make_tasks(400, 400)[0]
    monkeypatch.setattr(pieces, "MIN_IMAGES", 1)
    sizes = []
    for position in range(num_shards):
        count = num_pieces(task, position, num_shards, workers)
        sizes += [len(part.items) for part in cut(task, count)]
    assert sum(sizes) == 400 * num_shards
    busy = [0] * workers
    for size in sizes:
        busy[busy.index(min(busy))] += size
    share = sum(sizes) / workers
    assert max(busy) <= share + (1 / 4 if workers > 1 else 0) * max(400, share) + 1


def test_small_shards_and_a_single_worker_are_not_cut() -> None:
    assert num_pieces(make_tasks(199, 199)[0], 0, 1, 16) == 1
    assert num_pieces(make_tasks(200, 200)[0], 0, 1, 16) == 2
    assert num_pieces(make_tasks(200, 200)[0], 0, 1, 1) == 1
    assert num_pieces(make_tasks(2000, 2000)[0], 0, 40, 16) == 1


@pytest.mark.slow
def test_prepare_cuts_a_single_shard(tmp_path: Path) -> None:
    """1,797 digits in one shard of train and one of val: by one worker whole, by two in pieces."""
    words = ("prepare", "--source", "digits", "--encoding", "png")
    for workers in (1, 2):
        run(*words, "--workers", workers, "--output", tmp_path / str(workers))
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


@pytest.mark.slow
def test_an_error_in_a_piece_is_one_line(images: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number in range(400):
        path = source / f"class{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(next(images.rglob("*.png")))
    (source / "class0" / "bad.png").write_text("text")
    words = ("prepare", "--source", "folder", "--input", source, "--val-fraction", 0, "--resize", "none")
    done = run(
        *words, "--encoding", "png", "--workers", 2, "--on-error", "fail", "--output", tmp_path / "out", expect=2
    )
    assert done.stderr.startswith("error: class0/bad.png: not an image")
    assert len(done.stderr.splitlines()) == 1
