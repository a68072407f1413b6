"""A shard made by several workers: each makes a piece of its samples, one joins the pieces to the same bytes.

For the last shards of a run, so that no worker waits for others that still have a whole shard to make: with 17 shards
on 16 workers, 15 would wait for as long as everything before took. Sums are exact, so pieces change nothing.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np

from pipeline.preparation.shard import (
    BUFFER_BYTES,
    WORK_NAME,
    Filled,
    ShardJob,
    ShardResult,
    ShardTask,
    commit_shard,
    fill,
    finish_tar,
    temporary_file,
)
from pipeline.preparation.statistics import Totals
from pipeline.preparation.tar_writer import TarWriter

PIECES_PER_WORKER = 4  # then the last worker ends at most a quarter of a share after the first
MIN_IMAGES = 100  # of a piece: a fifth of a second of work, beside which a task of Ray costs nothing


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some samples of a shard, in a file of the work folder.

    Attributes:
        file: the file: their part of the tar.
        index: their lines of the index, with offsets in the piece.
        filled: what else is known of them.
    """

    file: Path
    index: tuple[str, ...]
    filled: Filled


def num_pieces(task: ShardTask, position: int, num_shards: int, workers: int) -> int:
    """Into how many pieces to cut a shard: one, but for the last of a run, which are those of more than a full round.

    Args:
        task: the shard.
        position: its place among the shards of the run.
        num_shards: shards of the run.
        workers: how many work at once.
    """
    last = min(workers + num_shards % workers, num_shards)
    if workers < 2 or position < num_shards - last:
        return 1
    return max(1, min(-(-PIECES_PER_WORKER * workers // last), len(task.items) // MIN_IMAGES))


def cut(task: ShardTask, count: int) -> list[ShardTask]:
    """The tasks of ``count`` pieces of a shard, equal but for one image, and none without any."""
    bounds = [len(task.items) * number // count for number in range(count + 1)]
    return [
        dataclasses.replace(task, start=task.start + start, items=task.items[start:end])
        for start, end in itertools.pairwise(bounds)
        if end > start
    ]


def build_piece(job: ShardJob, task: ShardTask) -> Piece:
    """Makes the samples of a piece, as :func:`pipeline.preparation.shard.build_shard` those of a shard."""
    with temporary_file(job, task, f"{task.stem}.unfinished-{task.start:08d}") as temporary:
        with temporary.open("wb", buffering=BUFFER_BYTES) as file:
            writer = TarWriter(file)
            filled = fill(job, task, writer).result()
        final = temporary.with_name(f"{task.stem}.piece-{task.start:08d}")
        temporary.replace(final)
    sums = filled.totals.position_sum  # uint32: half the size on its way to who joins
    totals = dataclasses.replace(filled.totals, position_sum=None if sums is None else sums.astype(np.uint32))
    return Piece(final, writer.lines(), dataclasses.replace(filled, totals=totals))


def join_pieces(job: ShardJob, task: ShardTask, *pieces: Piece) -> ShardResult:
    """Makes the shard out of all its pieces; :func:`remove_pieces` comes when whoever asked for it knows.

    Raises:
        OutputError: the output cannot be written.
    """
    with temporary_file(job, task, task.stem) as temporary:
        with temporary.open("wb", buffering=BUFFER_BYTES) as file:
            writer = TarWriter(file)
            for piece in pieces:
                with piece.file.open("rb") as samples:
                    writer.append(samples, piece.index)
            finish_tar(writer, file)
        filled = Filled(
            quarantine=tuple(line for piece in pieces for line in piece.filled.quarantine),
            sizes_px=frozenset().union(*(piece.filled.sizes_px for piece in pieces)),
            totals=functools.reduce(lambda first, second: first.merge(second), map(_wide_totals, pieces)),
            began_s=min(piece.filled.began_s for piece in pieces),
        )
        return commit_shard(job, task, temporary, writer, filled)


def remove_pieces(job: ShardJob, task: ShardTask) -> None:
    """Removes the files of a shard that was joined."""
    for path in (job.output / WORK_NAME / "tmp").glob(f"{task.stem}.piece-*"):
        path.unlink(missing_ok=True)


def _wide_totals(piece: Piece) -> Totals:
    totals = piece.filled.totals
    sums = totals.position_sum
    return dataclasses.replace(totals, position_sum=None if sums is None else sums.astype(np.uint64))
