"""What does the way through the cluster cost? prepare as a Ray job beside the same prepare run directly, in turns.

    python benchmarks/job_overhead.py --work /tmp/job-bench            about 18 minutes on 2 cores, 3 GB
    python benchmarks/job_overhead.py --work /tmp/job-bench --images 400 --rounds 1      a smoke test

Both make the same data set from 500x375 photos (JPEG, quality 95) on the same cores; a local cluster of one node runs
throughout. `images/s` is what prepare itself reports, without the start of Ray; `wall_s` is the whole command as a user
waits for it; `first_line_s` the time from submit to the first line of the job's log; `processor_s` what every kind of
process used, from before the command to its end (for a direct run, two Rays: its own, and the cluster that idles). The
order of the two changes from round to round. The results go to benchmarks/results/DATE_MACHINE_job_overhead.json.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from harness import CORES, ROOT, describe_machine, make_parser, ratio, spread, take_turns, write_results
from photos import write_class_folders

UNIQUE = 1000  # different images; the rest are hard links to them
TICKS = os.sysconf("SC_CLK_TCK")
KINDS = {  # of processes, by the first pattern that their command line matches
    "Ray": r"ray::(Dashboard|RuntimeEnv|Job)|ray-dashboard|gcs_server|raylet/raylet|dashboard/|log_monitor|monitor\.py",
    "workers": r"ray::|default_worker\.py|setup_worker\.py",
    "submit": r" -m cluster submit",
    "driver": r" -m (cluster\.jobs\.entry|pipeline prepare)",
}


def make_images(work: Path, count: int) -> Path:
    """Class folders with `count` images; kept for the next run."""
    folder = work / f"photos-{count}"
    if folder.exists():
        return folder
    unfinished = work / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    write_class_folders(unfinished, min(count, UNIQUE), width_px=500, height_px=375, quality=95)
    originals = sorted(unfinished.rglob("*.jpg"))
    for number in range(len(originals), count):
        original = originals[number % len(originals)]
        os.link(original, original.with_name(f"link-{number:06d}.jpg"))
    unfinished.rename(folder)
    return folder


def run(command: list[str], environment: dict[str, str]) -> tuple[str, float]:
    """The output of a command, and its wall time in seconds."""
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr, time.monotonic() - begin


class ProcessorTime(threading.Thread):
    """Seconds of processor time by kind of process while this is open, from /proc, read every second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._before = self._read()
        self._last: dict[tuple[str, str], tuple[str, float]] = {}
        self._over = threading.Event()

    def __enter__(self) -> "ProcessorTime":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Until it is closed; a process counts as it was when last seen."""
        while not self._over.wait(1.0):
            self._last |= self._read()

    def seconds(self) -> dict[str, float]:
        """The sum of each kind."""
        sums = dict.fromkeys(KINDS, 0.0)
        for process, (kind, used_s) in self._last.items():
            sums[kind] += used_s - self._before.get(process, ("", 0.0))[1]
        return {kind: round(used_s, 1) for kind, used_s in sums.items()}

    @staticmethod
    def _read() -> dict[tuple[str, str], tuple[str, float]]:
        """Kind and seconds of every process, by id and start time."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # not a process, or it has ended
                continue
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, words)), None)
            if kind:
                found[folder.name, fields[19]] = (kind, (int(fields[11]) + int(fields[12])) / TICKS)
        return found


def prepare(work: Path, images: Path, environment: dict[str, str], *, through_cluster: bool) -> dict[str, Any]:
    """One run, from an empty folder."""
    output = work / "output"
    shutil.rmtree(output, ignore_errors=True)
    command = ["-m", "pipeline", "prepare", "--source", "folder", "--input", str(images), "--output", str(output)]
    command += ["--workers", str(CORES)]
    if through_cluster:
        words = [sys.executable, "-m", "cluster", "submit", "--", "python", *command, "--address", "auto"]
    else:
        words = [sys.executable, *command]
    with ProcessorTime() as processor:
        text, wall_s = run(words, environment)
    found = re.search(r"prepared [\d,]+ images in ([\d.]+) s, ([\d,]+) images/s", text)
    first = re.search(r"first log line ([\d.]+) s", text)
    assert found, text
    return {
        "images_per_s": float(found[2].replace(",", "")),
        "prepare_s": float(found[1]),
        "wall_s": round(wall_s, 2),
        "first_line_s": float(first[1]) if first else None,
        "processor_s": processor.seconds(),
        "manifest_sha256": hashlib.sha256((output / "manifest.json").read_bytes()).hexdigest(),
        "load_before": os.getloadavg()[0],
    }


def measure(work: Path, images: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Direct and through the cluster, in turns."""
    folder = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_AUTH_TOKEN_PATH"] = str(folder / "c" / "token")  # of this cluster
    place = ["--folder", str(folder / "c")]
    cluster = [sys.executable, "-m", "cluster"]
    try:
        run([*cluster, "up", "--local", *place, "--dashboard-port", "0"], environment)
        environment["RAY_API_SERVER_ADDRESS"] = json.loads((folder / "c" / "cluster.json").read_text())["address"]
        cases = {
            name: functools.partial(prepare, work, images, environment, through_cluster=name == "cluster")
            for name in ("direct", "cluster")
        }
        return take_turns(cases, rounds)
    finally:
        run([*cluster, "down", *place], environment)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, work="images, which are kept, and outputs", rounds=5)
    parser.add_argument("--images", type=int, default=80000)
    arguments = parser.parse_args()
    machine = describe_machine("ray", "pillow", "simplejpeg", "numpy")
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = measure(arguments.work, make_images(arguments.work, arguments.images), arguments.rounds)
    print(json.dumps(summary(rows), indent=1))
    write_results(arguments.results, machine, {**summary(rows), "rounds": rows})


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures that the project promises something about."""

    def column(kind: str, key: str) -> list[float]:
        return [row[key] for row in rows[kind]]

    wall_s = ratio(column("direct", "wall_s"), column("cluster", "wall_s"))
    used = {kind: [sum(row["processor_s"].values()) for row in found] for kind, found in rows.items()}
    everything = [row for found in rows.values() for row in found]
    return {
        "cluster / direct, images/s": ratio(column("cluster", "images_per_s"), column("direct", "images_per_s")),
        "direct / cluster, wall time of the whole command": wall_s,
        "shortest job, s": min(row["prepare_s"] for row in everything),
        "cluster / direct, processor time of all processes": ratio(used["cluster"], used["direct"]),
        "submit to first log line, s": spread(column("cluster", "first_line_s")),
        "same manifest": len({row["manifest_sha256"] for row in everything}) == 1,
    }


if __name__ == "__main__":
    main()
