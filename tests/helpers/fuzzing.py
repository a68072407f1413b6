"""Code run on inputs that nobody meant, thousands of them, each decided by a seed: what must not happen is a finding.

A batch of inputs is run in a forked process, so that a crash, a loop or too much memory ends that process alone and is
known to be the input's. Allowed are the errors that a target names, in one line; what else is raised is a finding, and
so is a file that appears or changes beside the input's own folder. ``python -m tests.fuzz`` runs the targets.
"""

import dataclasses
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.trees import tree

LIMIT_S = 30  # an input takes milliseconds; a slow machine and a busy one are given a thousand times that
MEMORY_BYTES = 3 * 2**30  # more than the process has at its start
BATCH = 200
NUMBERS = ("-1", "0", "1", "-0", "99999999", "2147483648", "4294967295", "9223372036854775807", "18446744073709551615")
ODD_NUMBERS = (*NUMBERS, "1e999", "NaN", "-Infinity", "9" * 5000, "00000000000000001", "0.5", "true", "null", '"x"')
NAMES = ("", ".", "..", "../outside/new", "/dev/zero", "/dev/stdin", "a\nb", "\x1b[2J", "\u202egpj.exe", "x" * 5000)


@dataclasses.dataclass(frozen=True)
class Target:
    """Code that reads something, and inputs for it.

    Attributes:
        name: for people.
        make: makes an input; the path names a place outside the input's folder, for those that point there.
        run: runs the code on an input, in an empty folder.
        allowed: what it may raise.
        weight: how many inputs, compared with other targets.
    """

    name: str
    make: Callable[[random.Random, Path], Any]
    run: Callable[[Path, Any], None]
    allowed: tuple[type[BaseException], ...]
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that must not happen.

    Attributes:
        target: name of the target.
        seed, number: of the input: ``python -m tests.fuzz --target NAME --seed SEED --first NUMBER --count 1``.
        what: what happened.
    """

    target: str
    seed: int
    number: int
    what: str


def fuzz(target: Target, work: Path, *, seed: int, count: int, first: int = 0) -> Iterator[Finding]:
    """Runs a target on inputs ``first .. first + count - 1`` of a seed.

    Args:
        target: what to run.
        work: an empty folder, or one of an earlier call.
        seed: decides the inputs.
        count: how many.
        first: number of the first.
    """
    outside, inside = work / "outside", work / "inside"
    for folder in (outside / "home", outside / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    (outside / "precious").write_bytes(b"as it was")
    make_input(target, seed, first, outside)  # what inputs are made of is made here, once, and not in every child
    number, end = first, first + count
    while number < end:
        before = tree(outside)
        last = min(number + BATCH, end)
        number = yield from _batch(target, work, seed, number, last)
        if _changed(outside, before) or {path.name for path in work.iterdir()} - {"inside", "outside"}:
            yield Finding(target.name, seed, number - 1, f"a file was written outside, by an input up to {number - 1}")
    shutil.rmtree(inside, ignore_errors=True)


def make_input(target: Target, seed: int, number: int, outside: Path) -> Any:
    """Input ``number`` of a seed."""
    return target.make(random.Random(f"{target.name} {seed} {number}"), outside)


def _changed(outside: Path, before: dict[str, tuple[object, ...]]) -> bool:
    """Whether something is other than before; what lies in the folder for temporary files is nobody's."""
    return {k: v for k, v in tree(outside).items() if not k.startswith(("tmp", "home"))} != {
        k: v for k, v in before.items() if not k.startswith(("tmp", "home"))
    }


def _batch(target: Target, work: Path, seed: int, number: int, end: int) -> Iterator[Finding]:
    """Runs a batch in a process of its own; returns the number of the next input."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _in_child(target, work, seed, range(number, end), writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as lines:
        told = lines.read().decode().splitlines()
    _, status = os.waitpid(child, 0)
    last = number
    for line in told:
        last, what = json.loads(line)
        if what:
            yield Finding(target.name, seed, last, what)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        yield Finding(target.name, seed, last, f"no end within {LIMIT_S} s" if name == "SIGALRM" else f"died of {name}")
    return last + 1


def _in_child(target: Target, work: Path, seed: int, numbers: range, out: int) -> None:
    """Tells of each input before it is run, and of what it raised that was not allowed."""
    outside, inside = work / "outside", work / "inside"
    _confine(outside)
    for number in numbers:
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        os.chdir(inside)
        os.write(out, json.dumps([number, ""]).encode() + b"\n")
        made = make_input(target, seed, number, outside)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            target.run(inside, made)
        except target.allowed:
            pass
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
            os.write(out, json.dumps([number, what]).encode() + b"\n")
        signal.setitimer(signal.ITIMER_REAL, 0)


def _confine(outside: Path) -> None:
    """Home and temporary files lie where they are watched, output goes nowhere, and memory has an end."""
    os.environ |= {"HOME": str(outside / "home"), "TMPDIR": str(outside / "tmp")}
    os.environ["TWOTOWER_CACHE"] = str(outside / "home" / "cache")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(null, "w"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    faulthandler.disable()  # pytest's, which tells of what the parent tells
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process also where C code loops


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Some bytes changed, cut, doubled, or put in from another input."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        length = min(rng.choice((1, 1, 2, 4, 16, 64, 512)), len(out) - at)
        kind = rng.randrange(7)
        if kind == 0 and length:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = bytes(rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256))) for _ in range(length))
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length] * rng.choice((1, 2, 100))
        elif kind == 4:
            del out[at:]
        elif kind == 5 and others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at : at + length] = other[start : start + length]
        else:
            out[at : at + length] = rng.randbytes(length)
    return bytes(out)


def mutate_text(rng: random.Random, text: str) -> str:
    """A number or a word of a text made another one, a line doubled, left out or put elsewhere."""
    kind = rng.randrange(5)
    numbers = list(re.finditer(r"-?\d+", text))
    if kind < 2 and numbers:
        found = rng.choice(numbers)
        return text[: found.start()] + rng.choice(ODD_NUMBERS) + text[found.end() :]
    if kind == 2:
        words = list(re.finditer(r"[^\s,\"]+", text)) or [re.compile("").match(text)]
        found = rng.choice(words)
        return text[: found.start()] + rng.choice(NAMES) + text[found.end() :]
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    if kind == 3:
        lines.insert(rng.randrange(len(lines)), lines[at])
    else:
        del lines[at]
    return "\n".join(lines)


def mutate_json(rng: random.Random, value: Any, outside: Path) -> Any:
    """A JSON value with one part of it, however deep, made another one."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        kind = rng.randrange(12)
        if kind == 0:
            return {key: item for key, item in value.items() if key != name}
        if kind == 1:
            return value | {_odd_name(rng, outside): value[name]}
        return value | {name: mutate_json(rng, value[name], outside)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        kind = rng.randrange(8)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value, value[at]]
        return [*value[:at], mutate_json(rng, value[at], outside), *value[at + 1 :]]
    return _odd_value(rng, outside)


def _odd_name(rng: random.Random, outside: Path) -> str:
    return rng.choice((*NAMES, str(outside / "new"), str(outside / "precious")))


def _odd_value(rng: random.Random, outside: Path) -> Any:
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice((-1, 0, 1, 2**31, 2**63, 2**64 - 1, 99999999, 10**30, 0.5, -0.0, 1e308, float("nan")))
    if kind < 6:
        return _odd_name(rng, outside)
    deep: Any = 0
    for _ in range(rng.choice((1, 5, 400))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice((None, True, False, [], {}, [[]], deep, ["x"] * 1000, {"x": None}))
