"""Tries the mutations: ``python -m tests.mutations``.

Works in copies of the tracked files, never in the checkout. The tests that a mutation names run first; only where they
pass, all other fast tests of trainer/ and pipeline/ do: "not caught" then is a statement about the fast suite. torch
and DALI are imported once, here, and each mutation's pytest is a fork that imports the copy: most take seconds.
"""

import argparse
import dataclasses
import datetime
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.mutations import (
    Mutation,
    experiments,
    images,
    inference,
    neighbours,
    net,
    of_groups,
    peers,
    recipes,
    training,
    trust,
)

ROOT = Path(__file__).parents[2]
ROOMS = ("tests/trainer", "tests/pipeline")
PACKAGES = ("trainer", "pipeline", "cluster", "tests", "benchmarks")
CAUGHT, SURVIVED = 1, 0  # exit codes of pytest
TIMEOUT_S = 120  # a test; a mutation may make a process wait for ever


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutation.

    Attributes:
        mutation: which.
        code: exit code of pytest, :data:`CAUGHT` or :data:`SURVIVED`; another one is an error.
        test: the first test that failed.
        elapsed_s: seconds.
    """

    mutation: Mutation
    code: int
    test: str
    elapsed_s: float


Result = tuple[int, str, float]  # code, test, elapsed_s of an outcome
Job = Sequence[tuple[Mutation, Sequence[str]]]  # mutations, each with the tests to run
NOTHING = Mutation("nothing wrong", "Makefile", "\n", "\n", (), nth=1)


def mutations() -> list[Mutation]:
    """All of them."""
    listed = [
        *of_groups(net.GROUPS),
        *of_groups(training.GROUPS),
        *of_groups(images.GROUPS),
        *of_groups(inference.GROUPS),
        *of_groups(experiments.GROUPS),
        *of_groups(neighbours.GROUPS),
        *of_groups(trust.GROUPS),
        *of_groups(peers.GROUPS),
        *recipes.of_recipes(),
    ]
    names = [mutation.name for mutation in listed]
    doubled = {name for name in names if names.count(name) > 1}
    assert not doubled, f"several mutations are called {doubled}"
    return listed


def warm_up(folder: Path) -> None:
    """Imports what tests need and no mutation touches: forks have it then. Points caches and temporary files there."""
    for module in ("matplotlib.font_manager", "nvidia.dali.fn", "nvidia.dali.types", "scipy.io", "skimage", "sklearn"):
        importlib.import_module(module)
    for module in ("pytest", "torch._dynamo", "torch.func", "torch.testing", "safetensors.torch", "rich.console"):
        importlib.import_module(module)
    os.environ |= {"XDG_CACHE_HOME": str(folder), "PYTEST_DEBUG_TEMPROOT": str(folder)}


def make_copy(tree: Path) -> None:
    """The tracked files, as they are in the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


class FirstFailure:
    """A plugin of pytest that remembers what failed first."""

    def __init__(self) -> None:
        self.test = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def run_pytest(tree: Path, words: Sequence[str]) -> tuple[int, str]:
    """pytest in this process, on the tests of ``tree``. Returns its exit code and the first test that failed."""
    import pytest

    first = FirstFailure()
    options = ["-x", "-q", *("-p", "no:cacheprovider"), *("-m", "not slow and not gpu"), f"--timeout={TIMEOUT_S}"]
    code = pytest.main([*options, f"--rootdir={tree}", *words], plugins=[first])
    return int(code), first.test


def enter(tree: Path) -> None:
    """Makes this process one that runs in ``tree`` and knows nothing of the checkout."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(tree)
    os.chdir(tree)
    import trainer

    assert Path(str(trainer.__file__)).is_relative_to(tree), f"{trainer.__file__} is not in the copy"


def in_a_fork(tree: Path, function: Callable[[], list[Result]]) -> list[Result]:
    """What ``function`` returns in a process of its own, which runs in ``tree``; its output goes to a log beside it."""
    result, log = tree.parent / "result", tree.parent / "log"
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with log.open("wb") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            enter(tree)
            result.write_bytes(json.dumps(function()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.waitpid(pid, 0)
    if not result.exists():
        raise RuntimeError(f"a test process ended without a result:\n{log.read_text()[-2000:]}")
    return [(code, test, elapsed_s) for code, test, elapsed_s in json.loads(result.read_bytes())]


def try_in_turn(tree: Path, job: Job) -> list[Result]:
    """Makes each wrong, runs its tests, makes it right again. Several at a time must be of a file that is read anew."""
    results = []
    for mutation, words in job:
        path, begun = tree / mutation.file, time.perf_counter()
        right = path.read_text()
        path.write_text(mutation.apply(right))
        forget_bytecode(path)
        try:
            code, test = run_pytest(tree, words) if words else (SURVIVED, "")
        finally:
            path.write_text(right)
            forget_bytecode(path)
        results.append((code, test, time.perf_counter() - begun))
    return results


def forget_bytecode(path: Path) -> None:
    """A changed file may have the size and, to the second, the time of the one before: Python would not notice."""
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


_tree = Path()  # a worker's copy


def _start_worker(folder: Path) -> None:
    global _tree
    _tree = folder / str(os.getpid()) / "tree"
    make_copy(_tree)


def _try_job(job: Job) -> list[Outcome]:
    results = in_a_fork(_tree, lambda: try_in_turn(_tree, job))
    if any(code not in (CAUGHT, SURVIVED) for code, _, _ in results):
        print((_tree.parent / "log").read_text()[:6000], flush=True)
    return [Outcome(mutation, *result) for (mutation, _), result in zip(job, results, strict=True)]


def check_right(pool: Any, words: Sequence[str]) -> None:
    """Raises RuntimeError where a test fails with nothing made wrong: it would catch everything."""
    files = {word for word in words if "::" not in word}
    todo = sorted(files | {word for word in words if word.partition("::")[0] not in files})
    print(f"first with nothing made wrong: {' '.join(todo)}", flush=True)
    for word, (outcome,) in zip(todo, pool.imap(_try_job, [[(NOTHING, (word,))] for word in todo]), strict=True):
        if outcome.code != SURVIVED:
            raise RuntimeError(f"{word}: pytest ends with {outcome.code} as it is {outcome.test}")


def try_all(listed: Sequence[Mutation], folder: Path, *, jobs: int, rest: bool) -> dict[str, Outcome]:
    """Every mutation's outcome, by name: first the tests that it names, then ``rest`` of the fast ones."""
    outcomes: dict[str, Outcome] = {}
    with multiprocessing.get_context("fork").Pool(jobs, _start_worker, (folder,)) as pool:
        check_right(pool, [word for mutation in listed for word in mutation.tests])
        by_recipe = [m for m in listed if m.file.endswith(".toml")]
        todo = [[(m, m.tests)] for m in listed if m not in by_recipe]
        todo += [[(m, m.tests) for m in by_recipe if m.file == file] for file in sorted({m.file for m in by_recipe})]
        for outcome in itertools.chain.from_iterable(pool.imap_unordered(_try_job, todo)):
            show(outcome)
            outcomes[outcome.mutation.name] = outcome
        survivors = [outcome.mutation for outcome in outcomes.values() if outcome.code == SURVIVED]
        if survivors and rest:
            check_right(pool, ROOMS)
            left = [[(m, (*ROOMS, *(f"--ignore={w}" for w in m.tests if "::" not in w)))] for m in survivors]
            for outcome in itertools.chain.from_iterable(pool.imap_unordered(_try_job, left)):
                show(outcome)
                outcomes[outcome.mutation.name] = outcome
    return outcomes


def show(outcome: Outcome) -> None:
    """A line."""
    found = {CAUGHT: outcome.test, SURVIVED: "NOT CAUGHT"}.get(outcome.code, f"ERROR {outcome.code} {outcome.test}")
    print(f"{outcome.mutation.name:60} {outcome.elapsed_s:6.1f} s  {found}", flush=True)


def in_rows(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """Those of a recipe that ended alike together, all others alone."""
    rows: dict[tuple[str, int, str], list[Outcome]] = {}
    for outcome in outcomes:
        name = "" if outcome.mutation.file.endswith(".toml") and outcome.code == CAUGHT else outcome.mutation.name
        rows.setdefault((name, outcome.code, outcome.test), []).append(outcome)
    return list(rows.values())


def table(listed: Sequence[Mutation], outcomes: dict[str, Outcome], elapsed_s: float, jobs: int) -> str:
    """Everything as Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    caught = sum(outcome.code == CAUGHT for outcome in outcomes.values())
    lines = [
        "# Mutations",
        "",
        "One constant or operator at a time made wrong in a copy of the tree, and the first fast test that fails.",
        "Made by `python -m tests.mutations --table tests/mutations.md`; the lists are in `tests/mutations/`.",
        "",
        f"{datetime.date.today()}, commit {commit.strip()}, {platform.machine()} with {os.cpu_count()} cores, "
        f"{jobs} at a time: **{caught} of {len(listed)} caught** in {elapsed_s / 60:.0f} minutes.",
    ]
    for file in dict.fromkeys(mutation.file for mutation in listed):
        lines += ["", f"## {file}", "", "| mutation | caught by | s |", "|---|---|---|"]
        for rows in in_rows([outcomes[m.name] for m in listed if m.file == file]):
            tests = {f"`{row.test.removeprefix('tests/')}`" if row.code == CAUGHT else "**not caught**" for row in rows}
            name = rows[0].mutation.name if len(rows) == 1 else f"{len(rows)} values, one at a time"
            seconds = sum(row.elapsed_s for row in rows)
            lines.append(f"| {name} | {', '.join(sorted(tests))} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def miss(mutation: Mutation) -> str:
    """What a mutation says and the tree has not got: its text, a test; empty where all is there."""
    try:
        mutation.apply((ROOT / mutation.file).read_text())
        for file, _, test in (word.partition("::") for word in mutation.tests):
            if f"def {test}" not in (ROOT / file).read_text():
                return f"{mutation.name}: {file} has no test {test}: mend it in tests/mutations/"
    except (LookupError, OSError) as error:
        return f"{mutation.name}: {error}" if isinstance(error, OSError) else str(error)
    return ""


def main() -> int:
    """Exit code 1 where a mutation is not caught or cannot be tried, 2 where its text or its tests are not there."""
    parser = argparse.ArgumentParser(prog="tests.mutations", description="Makes one thing wrong at a time.")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="those with one of these in name or file")
    parser.add_argument("--jobs", type=int, default=1, help="at a time; each has a copy of the tree")
    parser.add_argument("--first", action="store_true", help="only the tests that a mutation names, not the rest")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument(
        "--check", action="store_true", help="only whether the texts and tests that they name are there"
    )
    parser.add_argument("--list", action="store_true", help="name them, run nothing")
    arguments = parser.parse_args()
    listed = [m for m in mutations() if not arguments.only or any(t in m.name or t in m.file for t in arguments.only)]
    misses = [text for mutation in listed if (text := miss(mutation))]
    if misses:
        print(*misses, sep="\n")
        return 2
    print(f"{len(listed)} mutations", flush=True)
    if arguments.list:
        print(*(f"{m.name:60} {m.file}" for m in listed), sep="\n")
    if arguments.list or arguments.check:
        return 0
    begun = time.perf_counter()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before the first import of NumPy: threads do not survive a fork
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        warm_up(Path(name))
        outcomes = try_all(listed, Path(name), jobs=arguments.jobs, rest=not arguments.first)
    elapsed_s = time.perf_counter() - begun
    if arguments.table:
        arguments.table.write_text(table(listed, outcomes, elapsed_s, arguments.jobs))
    escaped = [outcome for outcome in outcomes.values() if outcome.code != CAUGHT]
    print(f"{len(listed) - len(escaped)} of {len(listed)} caught in {elapsed_s:.0f} s")
    for outcome in escaped:
        show(outcome)
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
