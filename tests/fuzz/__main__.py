"""``python -m tests.fuzz --seed 1``: runs the targets, prints what must not happen, and ends with 1 if it does."""

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import MODULES
from tests.helpers.fuzzing import Finding, Target, fuzz


def targets() -> list[Target]:
    """All of them."""
    return [target for module in MODULES for target in importlib.import_module(module).TARGETS]


def main() -> int:
    """Runs them; a line each, and one for each finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000, help="inputs of all targets together")
    parser.add_argument("--target", help="only this one, and all inputs for it")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    args = parser.parse_args()
    chosen = [target for target in targets() if args.target in (None, target.name)]
    share = args.count / sum(target.weight for target in chosen)
    findings: list[Finding] = []
    total = 0
    for target in chosen:
        work, begin_s, count = Path(tempfile.mkdtemp(prefix="fuzz-")), time.monotonic(), round(share * target.weight)
        found = list(fuzz(target, work, seed=args.seed, count=count, first=args.first))
        shutil.rmtree(work)
        print(f"{target.name}: {count} inputs, {len(found)} findings, {time.monotonic() - begin_s:.1f} s", flush=True)
        for finding in found[:20]:
            again = f"--target '{target.name}' --seed {finding.seed} --first {finding.number} --count 1"
            print(f"  {finding.what!r}: {again}", flush=True)
        findings += found
        total += count
    print(f"{total} inputs, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
