"""The table of jobs: what `status` shows, in as few calls as it takes.

Ray's list of jobs is one call, whatever their number, and says of most jobs all that the table shows. Only some need
another: a running job its log's last lines (its progress), a stopped one its result file (its exit code). These calls
go side by side. The dashboard passes them on to the job's node, so a node that does not answer costs its own jobs'
figures and a few seconds, not the rest of the table.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError
from cluster.jobs import submission
from cluster.jobs.client import TERMINAL, Client, ServerError
from cluster.jobs.progress import Progress, latest
from twotower.words import one_line

AT_ONCE, MOST_AT_ONCE = 16, 64  # calls; Ray's dashboard takes 100
ANSWER_S = 3.0  # that a node has for a call
ALL_S = 8.0  # that the table waits for nodes in all
TAIL_LINES = 30
HEAD = ("ID", "STATE", "EXIT", "TIME", "STAGE", "DONE", "IMAGES/S", "LEFT")


@dataclass(frozen=True)
class Overview:
    """The table.

    Attributes:
        rows: a job each, in the order of the records.
        silent: ids of the nodes that did not answer, so that their jobs lack progress or exit code.
    """

    rows: tuple[dict[str, Any], ...]
    silent: tuple[str, ...]


@dataclass(frozen=True)
class _Details:
    """What a job's node knows of it.

    Attributes:
        result: the result file, see `Client.result`.
        tail: the last lines of its log.
    """

    result: dict[str, Any] | None = None
    tail: str = ""


def job_row(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    """All that is known of one job.

    Raises:
        ClusterError: the cluster does not answer.
    """
    return _row(job, _ask(client, job, None))


def overview(client: Client, jobs: Sequence[dict[str, Any]]) -> Overview:
    """The rows of many jobs; what a silent node would have said is left out of them."""
    asked = {number: job for number, job in enumerate(jobs) if _needs_node(job)}
    found, silent = _ask_nodes(asked, lambda job: _ask(client, job, ANSWER_S))
    return Overview(tuple(_row(job, found.get(number, _Details())) for number, job in enumerate(jobs)), tuple(silent))


def _needs_node(job: dict[str, Any]) -> bool:
    """Whether the list does not tell all that the table shows of a job, and its node may."""
    if not job.get("driver_node_id"):
        return False
    told = job["status"] == "SUCCEEDED" or (job["status"] == "FAILED" and job.get("driver_exit_code"))
    return not told


def _ask_nodes(
    jobs: dict[int, dict[str, Any]], ask: Callable[[dict[str, Any]], _Details]
) -> tuple[dict[int, _Details], list[str]]:
    """Asks the nodes of some jobs: each for one job first, and for the rest only those that have answered."""
    first: dict[str, int] = {}
    for number, job in jobs.items():
        first.setdefault(job["driver_node_id"], number)
    rest = [number for number in jobs if number not in first.values()]
    deadline = time.monotonic() + ALL_S
    found: dict[int, _Details] = {}
    silent: list[str] = []
    for numbers in (list(first.values()), rest):
        todo = [number for number in numbers if jobs[number]["driver_node_id"] not in silent]
        if not todo:
            continue
        pool = ThreadPoolExecutor(min(MOST_AT_ONCE, max(AT_ONCE, len(first))))  # a silent node keeps only its own place
        futures = {pool.submit(ask, jobs[number]): number for number in todo}
        done, _ = wait(futures, timeout=max(0.0, deadline - time.monotonic()))
        pool.shutdown(wait=False, cancel_futures=True)
        for future, number in futures.items():
            if future in done and not isinstance(future.exception(), ClusterError):
                found[number] = future.result()
            elif jobs[number]["driver_node_id"] not in silent:
                silent.append(jobs[number]["driver_node_id"])
    return found, silent


def _ask(client: Client, job: dict[str, Any], timeout_s: float | None) -> _Details:
    """The job's result file if it is over, else its progress; both where there is time (no ``timeout_s``).

    Raises:
        Unreachable: no answer in time.
    """
    over, node = job["status"] in TERMINAL, job.get("driver_node_id")
    if not node:
        return _Details()
    result = client.result(job, timeout_s) if over else None
    if over and timeout_s is not None:
        return _Details(result)
    try:
        tail = client.log(job["submission_id"], node, lines=TAIL_LINES, timeout_s=timeout_s)
    except ServerError:
        return _Details(result)
    return _Details(result, tail.decode(errors="replace"))


def _row(job: dict[str, Any], details: _Details) -> dict[str, Any]:
    over = job["status"] in TERMINAL
    end = submission.ending_of(job, details.result) if over else None
    progress = _progress(job, details)
    entrypoint = submission.command_line(job)
    now_ms = (job.get("end_time") if over else None) or time.time() * 1000
    return {
        "id": job["submission_id"],
        "state": end.outcome if end else job["status"].lower(),
        "exit_code": end.exit_code if end else None,
        "elapsed_s": round((now_ms - (job.get("start_time") or now_ms)) / 1000, 1),
        "stage": submission.stage_of(entrypoint.split()),
        "done": progress.done if progress else None,
        "total": progress.total if progress else None,
        "images_per_s": progress.images_per_s if progress else None,
        "left": progress.left if progress and not over else "",
        "entrypoint": entrypoint,
    }


def _progress(job: dict[str, Any], details: _Details) -> Progress | None:
    """What the log's last lines tell; of a failed job Ray has them in its message."""
    return latest(details.tail or (str(job.get("message") or "") if job["status"] == "FAILED" else ""))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows, a job a line."""
    table = [HEAD]
    for row in rows:
        done = f"{row['done']}/{row['total']}" if row["total"] is not None else ""
        rate = f"{row['images_per_s']:.0f}" if row["images_per_s"] is not None else ""
        code = "" if row["exit_code"] is None else str(row["exit_code"])
        cells = (one_line(row["id"]), row["state"], code, f"{row['elapsed_s']:.0f} s", row["stage"])
        table.append((*cells, done, rate, row["left"]))
    widths = [max(len(line[column]) for line in table) for column in range(len(HEAD))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
