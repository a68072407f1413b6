"""The recipes of 2012 made wrong: every number, word and switch, one at a time."""

import collections
import re
from collections.abc import Iterator
from pathlib import Path

from tests.mutations import Mutation

ROOT = Path(__file__).parents[2]
FACTS = "tests/trainer/test_recipes.py::test_facts_of_the_recipes"
OF_2012 = ("paper", "original", "original-2010", "handsoff", "half")
OTHER_WORDS = {
    "auto": "fp32",
    "true": "false",
    "false": "true",
    "original": "inverted",
    "image": "channel",
    "image_center": "image",
    "none": "per_channel",
    "eigenvalue": "deviation",
    "deviation": "eigenvalue",
    "plateau": "log_thirds",
    "log_thirds": "plateau",
    "steps": "plateau",
    "constant": "same",
    "halfway": "same",
    "conv1": "conv2",
    "relu": "tanh",
    "lrn": "lrn_within_channel",
    "lrn_within_channel": "lrn",
    "maxpool": "lrn",
}
TOKEN = re.compile(r'"[^"]*"|\btrue\b|\bfalse\b|(?<![\w"])\d[\d.e-]*')


def of_recipes() -> Iterator[Mutation]:
    """Every number, word and switch, one at a time; of a line that stands in original.toml too, only the last."""
    known = (ROOT / "configs/original.toml").read_text().splitlines()
    for recipe in OF_2012:
        file, key, counts = f"configs/{recipe}.toml", "", collections.Counter[str]()
        for line in (ROOT / file).read_text().splitlines():
            code = line.partition("#")[0]
            if code.startswith("["):
                continue
            key = code.partition(" = ")[0] if re.match(r"\w+ = ", code) else key
            tokens = list(TOKEN.finditer(code))
            for token in tokens[-1:] if recipe != "original" and line in known else tokens:
                counts[key] += 1
                new = _other(token.group(), f"{file}: {line}")
                changed = line[: token.start()] + new + line[token.end() :]
                name = f"{recipe}: {key} {counts[key]}, {token.group()} is {new}"
                yield Mutation(name, file, f"\n{line}\n", f"\n{changed}\n", (FACTS,))


def _other(token: str, where: str) -> str:
    """Another value of the same kind."""
    word = token.strip('"')
    if token[0].isdigit():
        return str(int(token) + 2) if token.isdigit() else repr(float(token) * 2 or 1.0)
    assert word in OTHER_WORDS, f"{where}: OTHER_WORDS in {__file__} has no other word for {token}"
    return token.replace(word, OTHER_WORDS[word])
