"""``make test-isa``: the numeric tests with the instructions, the threads and the kernels of other machines.

What one processor adds in eight lanes, another adds in four, with fused products or without, and rounds otherwise. No
test may depend on that. Four settings take three values each:

- oneDNN's instructions (convolutions, bfloat16 products): ``ONEDNN_MAX_CPU_ISA``;
- ATen's (everything else of torch): ``ATEN_CPU_CAPABILITY``;
- threads per process: ``OMP_NUM_THREADS``;
- our own kernels: compiled for this processor, for x86-64-v3 (AVX2, no AVX-512), or ``TWOTOWER_KERNELS=off``.

All combinations are 81 (``--full``). The nine of an orthogonal array have every value of each setting together with
every value of each other one, once: where two settings are wrong together, it shows. A tenth run takes oneDNN with its
bfloat16 instructions, as the nine end before those. ATen and oneDNN can only be told to do with less than the processor
has: where that has less, its best stands in, and a line says so. Select tests with the marker ``numeric``.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
# Value and what the processor must have for it; from the least to the best.
ONEDNN = {"SSE41": (), "AVX2": ("avx2",), "AVX512_CORE": AVX512}
ATEN = {"default": (), "avx2": ("avx2", "fma"), "avx512": AVX512}
THREADS = ("1", "2", "4")
BFLOAT16 = "AVX512_CORE_BF16"
WITHOUT_AVX512 = """/bin/sh -c 'exec c++ "$@" -march=x86-64-v3' c++"""  # the last -march counts
KERNELS = {"native": {}, "x86-64-v3": {"CXX": WITHOUT_AVX512}, "off": {"TWOTOWER_KERNELS": "off"}}
Row = tuple[str, str, str, str]  # oneDNN, ATen, threads, kernels


def processor_flags() -> set[str]:
    """Instruction sets as Linux names them; none elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, flags=re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def rows(full: bool) -> list[Row]:
    """What to run, on a processor that has everything."""
    values = (list(ONEDNN), list(ATEN), list(THREADS), list(KERNELS))
    if full:
        return [*itertools.product(*values)]
    picks = [(i, j, (i + j) % 3, (i + 2 * j) % 3) for i in range(3) for j in range(3)]
    return [tuple(value[pick] for value, pick in zip(values, row, strict=True)) for row in picks]  # type: ignore[misc]


def fit(wanted: list[Row], flags: set[str], compiler: bool) -> tuple[list[Row], list[str]]:
    """The rows this machine can run, without doubles, and lines that say what it cannot."""
    said, stand_in = [], {}
    for name, levels in (("ONEDNN_MAX_CPU_ISA", ONEDNN), ("ATEN_CPU_CAPABILITY", ATEN)):
        best = [level for level, needs in levels.items() if flags.issuperset(needs)][-1]
        for level in levels:
            if not flags.issuperset(levels[level]):
                stand_in[level] = best
                said.append(f"left out: {name}={level}, which this processor does not have; {best} instead")
    if not compiler or "avx2" not in flags:
        why = "this processor has no AVX2" if compiler else "there is no c++"
        stand_in["x86-64-v3"] = "native" if compiler else "off"
        said.append(f"left out: kernels compiled for x86-64-v3, as {why}; {stand_in['x86-64-v3']} instead")
    if not compiler:
        stand_in["native"] = "off"
        said.append("left out: compiled kernels, as there is no c++")
    fitted = [tuple(stand_in.get(value, value) for value in row) for row in wanted]
    if "avx512_bf16" in flags and flags.issuperset(AVX512):
        fitted.append((BFLOAT16, "avx512", "2", "native" if compiler else "off"))
    else:
        said.append(f"left out: {BFLOAT16}, as this processor has no bfloat16 instructions")
    return list(dict.fromkeys(fitted)), said  # type: ignore[arg-type]


def run(row: Row, selected: str, words: list[str]) -> tuple[bool, str]:
    """One pytest; whether it passed, and its summary with the names of what failed."""
    onednn, aten, threads, compiled = row
    settings = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten, "OMP_NUM_THREADS": threads}
    settings["OMP_WAIT_POLICY"] = "PASSIVE"  # more threads than cores: those that wait must not hold up those that work
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "TWOTOWER_KERNELS")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selected, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | settings | KERNELS[compiled], capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = re.sub(r",? ?\d+ (deselected|warnings?)|=| in [\d.]+s.*", "", lines[-1]).strip()
    return done.returncode == 0, "\n    ".join([summary, *bad])


def main() -> int:
    """Exit code 1 where any run failed."""
    parser = argparse.ArgumentParser(prog="tests.isa", description="The numeric tests under other instruction sets.")
    parser.add_argument("--full", action="store_true", help="all 81 combinations (hours)")
    parser.add_argument("--slow", action="store_true", help="the slow numeric tests too")
    parser.add_argument("words", nargs="*", help="for pytest: folders, files, after -- also options")
    arguments = parser.parse_args()
    compiler = shutil.which("c++") is not None
    fitted, said = fit(rows(arguments.full), processor_flags(), compiler)
    print(*said, sep="\n", end="\n" if said else "")
    selected = "numeric and not gpu" + ("" if arguments.slow else " and not slow")
    print(f"{'oneDNN':18}{'ATen':9}{'threads':9}{'kernels':11}{'seconds':>7}  result", flush=True)
    failed = 0
    for row in fitted:
        begun = time.perf_counter()
        passed, result = run(row, selected, arguments.words)
        failed += not passed
        onednn, aten, threads, compiled = row
        elapsed_s = time.perf_counter() - begun
        print(f"{onednn:18}{aten:9}{threads:9}{compiled:11}{elapsed_s:7.0f}  {result}", flush=True)
    print(f"{len(fitted)} combinations, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
