"""Imported before all else by ``python -m PACKAGE``: one line on other systems, instead of what would fail first."""

import sys

if sys.platform != "linux":
    print(f"error: twotower runs on Linux only, as DALI does, and this is {sys.platform}: use Linux, WSL 2 or the "
          "Dockerfile", file=sys.stderr)  # fmt: skip
    raise SystemExit(2)
