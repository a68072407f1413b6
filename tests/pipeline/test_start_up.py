"""What refuses or explains imports nothing that is slow to import."""

import subprocess
import sys

import pytest

from tests.helpers.preparing import ROOT, environment

SLOW = ("torch", "ray", "nvidia", "matplotlib", "scipy", "sklearn", "simplejpeg", "rich", "fsspec")
PROGRAM = """
import sys
from pipeline.__main__ import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print(code, *(name for name in {slow!r} if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("prepare --help", 0),
        ("reindex --help", 0),
        ("prepare --sorce digits", 2),
        ("prepare --source nothing --output x", 2),
        ("prepare --source folder --output x", 2),
        ("prepare --source digits --output x --shard-size 0", 2),
        ("prepare --source cifar10 --input s3://bucket --output x", 2),
    ],
)
def test_help_and_refusals_import_nothing_slow(words: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(slow=SLOW), *words.split()],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == str(code)
