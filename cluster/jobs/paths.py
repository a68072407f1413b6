"""Which words of a job's command are paths, and what becomes of them.

A job runs in a copy of the working tree that Ray deletes: a result written to a relative path would be lost, with exit
code 0. So every path of every command of ours is made absolute, where the cluster is on this machine, or refused.

The table below repeats what the commands' own parsers know, since `cluster` imports neither `trainer` nor `pipeline`;
`tests/cluster/test_paths.py` walks the parsers and fails where an option is missing here.
"""

import itertools
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterError
from cluster.jobs.tree import TREE

# Every option that takes a value, as NAME[:KIND][NUMBER OF VALUES]; a word without dashes: what stands alone. Kinds:
#   path    a file or folder
#   data    one, or a URL
#   run     one, or `auto` or `never`
#   recipe  one, or a file of the tree that is sent
#   none    not a path
# Number of values: 1 if not given; ?: none or one; +: one or more.
OPTIONS = {
    "trainer": {
        "train": "--config:recipe --set --data:data --run:path --processes --replicas --device --backend --resume:run "
        "--skip-list:path --profile? --init-from:path --freeze",
        "tower": "--data:data --run:path --device --backend --profile? --skip-list:path",
        "evaluate": "--run:path --checkpoint --data:data --split --views --confusion:path --device",
        "predict": "images:path+ --run:path --checkpoint --data:data --views --top --device --html:path",
        "features": "images:path+ --run:path --checkpoint --data:data --layer --device --output:path",
        "neighbours": "images:path+ --run:path --checkpoint --data:data --layer --device --among:path+ --count "
        "--html:path",
        "describe": "--config:recipe --set --per-pair --bandwidth-gb-s --pair-bandwidth-gb-s --latency-us --tflops "
        "--loader-images-s --samples --evaluated --svg:path",
        "report": "--run:path --data:data",
        "config": "--config:recipe --set",
        "export": "--run:path --checkpoint --data:data --output:path",
        "import": "--weights:path --config:recipe --set --run:path --data:data",
        "bench": "--config:recipe --set --data:data --processes --device --backend --seconds --batch-sizes --json:path "
        "--html:path --project --tower-link --replica-link --read:path+ --compare:path2",
        "bench-tower": "--job:path",
        "experiment": "name --config:recipe --set --data:data --output:path --seeds --variants --parallel --processes "
        "--address --cpus --gpus --device",
    },
    "pipeline": {
        "prepare": "--source --input:data --labels:data --output:data --seed --shard-size --val-fraction --resize "
        "--encoding --quality --filter --label-order --on-error --max-errors --max-pixels --max-bytes --workers "
        "--splits --limit --address",
        "verify": "folder:path",
        "status": "folder:path",
        "inspect": "folder:path --split --sheet:path --images --sample --image:path",
        "statistics": "folder:path --image:path",
        "reindex": "path:path",
        "bench": "--data:data --recipe:recipe --device --batch-size --threads --seconds --repeats",
    },
}
_ENTRY = re.compile(r"(?P<name>(?:--)?[a-z][\w-]*?)(?::(?P<kind>path|data|run|recipe))?(?P<count>[?+2])?")
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/+")


@dataclass(frozen=True)
class Option:
    """What follows an option, or what words alone are.

    Attributes:
        name: the option; of words alone, what they are called.
        kind: path, data, run, recipe or none, see `OPTIONS`.
        count: how many values: "1", "2", "?" or "+".
    """

    name: str
    kind: str
    count: str


@dataclass(frozen=True)
class PathWord:
    """A path in a command.

    Attributes:
        position: of the word that holds it.
        option: what it is for.
        value: the path.
    """

    position: int
    option: Option
    value: str

    def __str__(self) -> str:
        return f"{self.option.name} {self.value}" if self.option.name.startswith("--") else self.value


def options_of(package: str, command: str) -> dict[str, Option]:
    """The options with values of a command, by name."""
    found = [_ENTRY.fullmatch(word) for word in OPTIONS[package][command].split()]
    rows = [Option(match["name"], match["kind"] or "none", match["count"] or "1") for match in found if match]
    return {option.name: option for option in rows}


def path_words(command: Sequence[str]) -> list[PathWord]:
    """The paths in a command line of ours, whatever stands before it (python, torchrun, env); [] in others."""
    for position, (package, name) in enumerate(itertools.pairwise(command)):
        package = Path(package.removesuffix("/__main__.py")).name
        if name in OPTIONS.get(package, ()):
            found = _walk(command, position + 2, options_of(package, name))
            return [place for place in found if place.option.kind != "none"]
    return []


def _walk(command: Sequence[str], position: int, options: dict[str, Option]) -> Iterator[PathWord]:
    """The paths from `position` on, read as argparse reads them."""
    alone = next((option for name, option in options.items() if not name.startswith("--")), None)
    only_words = False  # after --
    while position < len(command):
        word = command[position]
        name, equals, inline = word.partition("=")
        option = options.get(name)
        position += 1
        if only_words or not _is_option(word):
            if alone:
                yield PathWord(position - 1, alone, word)
        elif word == "--":
            only_words = True
        elif option and equals:
            yield PathWord(position - 1, option, inline)
        elif option:
            end = position + {"1": 1, "?": 1, "2": 2, "+": len(command)}[option.count]
            for value in itertools.takewhile(lambda value: not _is_option(value), command[position:end]):
                yield PathWord(position, option, value)
                position += 1


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def absolute_paths(command: Sequence[str], address: str, here: bool, sent: Collection[str] = ()) -> tuple[str, ...]:
    """The command with absolute paths.

    Args:
        command: program and arguments.
        address: the dashboard, for messages.
        here: whether the cluster is on this machine, where a relative path means what it means without a cluster.
        sent: the files of the tree that the job gets, see `tree.choose`.

    Raises:
        ClusterError: a relative path that cannot be made absolute, a URL where none can be used, no path at all.
    """
    words = list(command)
    for place in path_words(command):
        value = _absolute(place, address, here, sent)
        inline = words[place.position].startswith(f"{place.option.name}=")
        words[place.position] = f"{place.option.name}={value}" if inline else value
    for word in command:
        _check_shell_text(word, address, sent)
    return tuple(words)


def _absolute(place: PathWord, address: str, here: bool, sent: Collection[str]) -> str:
    value, kind = place.value, place.option.kind
    if (kind == "run" and value in ("auto", "never")) or (kind == "data" and _URL.match(value)):
        return value
    if not value or _URL.match(value):
        raise ClusterError(f"{place.option.name} {value!r}: expected a file or folder, as an absolute path")
    path = Path(value)
    if path.is_absolute():
        return value
    if kind == "recipe" and (inside := _in_sent_tree(path, sent)):
        return inside
    if here:
        return str(Path.cwd() / path)
    what = "an absolute path or URL" if kind == "data" else "an absolute path"
    where = " (the tree that is sent has no such file: `git add` it, or --include it)" if kind == "recipe" else ""
    raise ClusterError(f"{place}: give {what} that every node of {address} can reach{where}")


def _in_sent_tree(path: Path, sent: Collection[str]) -> str | None:
    """A file's path inside the tree that is sent; None if it is not sent."""
    found = next((place for place in (path.resolve(), TREE / path) if place.is_file()), None)
    if found is None or not found.is_relative_to(TREE):
        return None
    inside = found.relative_to(TREE).as_posix()
    return inside if inside in sent else None


def _check_shell_text(text: str, address: str, sent: Collection[str]) -> None:
    """Refuse a relative path in the text of `bash -c TEXT`, which is not rewritten; what a shell expands may stand."""
    if not any(package in text for package in OPTIONS) or not re.search(r"\s", text):
        return
    lexer = shlex.shlex(text.replace("\n", " ; "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a quote that is not closed: no shell will run it
        return
    for ends, part in itertools.groupby(words, lambda word: set(word) <= set("();<>|&")):
        for place in path_words([] if ends else list(part)):
            if place.value[:1] not in ("$", "~", "`"):
                try:
                    _absolute(place, address, False, sent)
                except ClusterError as error:
                    raise ClusterError(f"in {text!r}: {error}") from None


def shared_paths(command: Sequence[str]) -> list[str]:
    """The absolute paths in a command, which every node must see."""
    return list(dict.fromkeys(place.value for place in path_words(command) if Path(place.value).is_absolute()))
