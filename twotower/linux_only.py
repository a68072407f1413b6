"""Imported before all else by ``python -m PACKAGE``: one line on other systems, instead of what would fail first."""

import sys

FIX = "use Linux, WSL 2, or the Dockerfile in a virtual machine with Linux"

if sys.platform != "linux":
    print(f"error: twotower runs on Linux only, as DALI does, and this is {sys.platform}: {FIX}", file=sys.stderr)
    raise SystemExit(2)
