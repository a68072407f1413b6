"""Where a run's figures go besides ``metrics.jsonl``: one small interface, and one file of this folder for a logger.

A file here, ``NAME.py``, is a value of ``train.loggers``. It has

- ``open_logger(run, config, from_step)``, which gives a :class:`Logger`;
- ``IN_BACKGROUND``: it talks to a service, so it is opened and fed in a thread, and training never waits for it.

What a logger must remember of a run, so that a resumed run goes on in the same place, is in ``RUN/loggers/NAME.json``.
A logger that fails says so in one line, and is left out from then on; nothing else of the run changes.
"""

import dataclasses
import importlib
import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pipeline.manifest import write_atomic
from trainer.config import Config
from twotower.terminal import warn
from twotower.untrusted import parse_json, read_regular
from twotower.verbosity import log
from twotower.version import find_commit

FOLDER = "loggers"  # of a run
MOST_BYTES = 1 << 20  # of what a logger notes
MOST_WAITING = 100_000  # rows that a logger is behind, until it counts as failed
CLOSE_S = {"finished": 30.0, "stopped": 20.0, "failed": 5.0}  # that a run waits for what is still to be sent


class Logger(Protocol):
    """Takes the rows of metrics.jsonl."""

    def add(self, row: dict[str, Any], at_s: float) -> None:
        """Takes a row, and when it was, in seconds of ``time.time``."""

    def flush(self) -> None:
        """Makes what was added visible to readers, or sends it."""

    def close(self, exit_reason: str) -> None:
        """Flushes, and ends the logged run: it has ``finished``, was ``stopped``, or ``failed``."""


class Loggers:
    """The loggers of a run; each fails alone.

    Args:
        run: run folder.
        config: its recipe.
        from_step: the first step that will be added.
    """

    def __init__(self, run: Path, config: Config, from_step: int) -> None:
        self._loggers = {name: _Guarded(name, run, config, from_step) for name in dict.fromkeys(config.train.loggers)}

    def add(self, row: dict[str, Any], at_s: float) -> None:
        """Gives a row to all."""
        for logger in self._loggers.values():
            logger.do(lambda inner: inner.add(row, at_s))

    def flush(self) -> None:
        """Makes what was added visible to readers."""
        for logger in self._loggers.values():
            logger.do(lambda inner: inner.flush())

    def close(self, exit_reason: str) -> None:
        """Ends all, side by side; see ``CLOSE_S``."""
        for logger in self._loggers.values():
            logger.do(lambda inner: inner.close(exit_reason))
        deadline_s = time.monotonic() + CLOSE_S[exit_reason]
        for logger in self._loggers.values():
            logger.do(lambda inner: inner.wait(deadline_s) if isinstance(inner, _Background) else None)


class _Guarded:
    """A logger that is left out once it has failed."""

    def __init__(self, name: str, run: Path, config: Config, from_step: int) -> None:
        self._name = name
        self._logger: Logger | None = None
        try:
            module = importlib.import_module(f"{__name__}.{name}")
            if module.IN_BACKGROUND:
                self._logger = _Background(name, lambda: module.open_logger(run, config, from_step))
            else:
                self._logger = module.open_logger(run, config, from_step)
        except Exception as error:
            self._give_up(error)

    def do(self, work: Callable[[Logger], None]) -> None:
        """Does something with the logger, as long as there is one."""
        if self._logger is None:
            return
        try:
            work(self._logger)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._logger = None
        say_failed(self._name, error)


class _Background:
    """A logger in a thread of its own, so that neither a slow network nor a dead one holds up a step."""

    def __init__(self, name: str, open_logger: Callable[[], Logger]) -> None:
        self._name, self._open = name, open_logger
        self._rows: queue.Queue[tuple[dict[str, Any], float] | str] = queue.Queue(MOST_WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)
        self._thread.start()

    def add(self, row: dict[str, Any], at_s: float) -> None:
        """Puts a row into the queue."""
        if not self._failed:
            self._put((row, at_s))

    def flush(self) -> None:
        """Does nothing: the thread sends what is there whenever it can."""

    def close(self, exit_reason: str) -> None:
        """Lets the thread end once everything is sent."""
        if not self._failed:
            self._put(exit_reason)

    def wait(self, deadline_s: float) -> None:
        """Waits for the thread's end.

        Raises:
            TimeoutError: it has not come by ``deadline_s`` of ``time.monotonic``; the thread is left alone.
        """
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive():
            self._failed = True
            raise TimeoutError("no answer at the end of the run, so its last rows may be missing there")

    def _put(self, item: tuple[dict[str, Any], float] | str) -> None:
        try:
            self._rows.put_nowait(item)
        except queue.Full:
            self._failed = True
            raise TimeoutError(f"no answer while {MOST_WAITING:,} rows were waiting") from None

    def _run(self) -> None:
        try:
            self._feed(self._open())
        except Exception as error:
            if not self._failed:
                self._failed = True
                say_failed(self._name, error)

    def _feed(self, logger: Logger) -> None:
        """Gives the logger everything that waits, again and again, until the run's end."""
        log.debug("logger %s is open", self._name)
        while True:
            items = [self._rows.get()]
            while not self._rows.empty():
                items.append(self._rows.get())
            for item in items:
                if isinstance(item, str):
                    logger.flush()
                    logger.close(item)
                    return
                logger.add(*item)
            logger.flush()


def say_failed(name: str, error: Exception) -> None:
    """One line: what a logger could not do costs the run nothing."""
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        why = f"{name} is not installed; pip install -e '.[{name}]'"
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = f"{lines[0][:200]}"
    warn(f"train.loggers: {name} is left out from now on, training goes on: {why}")
    log.debug("the error of %s arose here:", name, exc_info=error)


def recall(run: Path, name: str) -> dict[str, Any]:
    """What a logger noted of a run; {} where it is new to it."""
    try:
        found = parse_json(read_regular(run / FOLDER / f"{name}.json", MOST_BYTES, follow=False))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note(run: Path, name: str, facts: dict[str, Any]) -> None:
    """Keeps what a logger must know when the run goes on."""
    (run / FOLDER).mkdir(exist_ok=True)
    write_atomic(run / FOLDER / f"{name}.json", (json.dumps(facts) + "\n").encode())


def flat_recipe(config: Config) -> dict[str, Any]:
    """The recipe as ``{"train.epochs": 90, ...}``, and the commit that trains it."""

    def walk(table: dict[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in table.items():
            found |= walk(value, f"{where}{name}.") if isinstance(value, dict) else {f"{where}{name}": value}
        return found

    return walk(dataclasses.asdict(config), "") | {"commit": find_commit() or "unknown"}


def scalars_of(row: dict[str, Any]) -> dict[str, float]:
    """Every float of a row of metrics.jsonl as ``KIND/NAME``, that of a tower as ``KIND/NAME_TOWER``."""
    found = {}
    for key, value in row.items():
        if isinstance(value, float):
            found[f"{row['kind']}/{key}"] = value
        elif isinstance(value, dict):
            found |= {f"{row['kind']}/{key}_{name}": each for name, each in value.items()}
    return found
