"""Your own photos: how good after three commands, and what does it bring to begin with weights learned on others?

    python benchmarks/own_photos.py --work /tmp/own_photos                        about 6 minutes on two cores
    python benchmarks/own_photos.py --work /tmp/own_photos --seeds 0 --epochs 5   a try
    python benchmarks/own_photos.py --work /tmp/own_photos --variants             5 minutes

60 photos in three classes (coffee, a cat, galaxies) and 180 in nine others are crops of scikit-image's and sklearn's
photos, cells of a grid: no two share a pixel, so no held-out one has been seen. First the README's three commands,
as they stand there. Then configs/photos.toml on the nine classes, and on the three with and without --init-from that
run, evaluated after every epoch, for each seed. With --variants, instead: all twelve classes, with batch and with
response normalization, at 128 and at 64 px.
Results: benchmarks/results/DATE_MACHINE_own_photos.json, and the curves beside it as .png.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from harness import CORES, ROOT, describe_machine, make_parser, save_curves, spread, write_results
from photos import write_disjoint_crops

THREE = ("coffee.png", "chelsea.png", "hubble_deep_field.jpg")
NINE = ("ihc.png", "flower.jpg", "motorcycle_left.png", "brick.png", "grass.png", "gravel.png")
NINE += ("retina.jpg", "china.jpg", "astronaut.png")
GOAL = 0.9  # of the held-out photos
LRN = 'model.post_ops=[["relu","lrn","maxpool"],["relu","lrn","maxpool"],["relu"],["relu"],["relu","maxpool"]]'
AT_64 = ("model.image_px=64", "model.kernel_sizes=[7,5,3,3,3]", "model.strides=[2,1,1,1,1]")
AT_64 += ("model.paddings=[[2,3],[2,2],[1,1],[1,1],[1,1]]",)  # the maps after conv1 are as large as at 128 px
VARIANTS = {
    "batch norm, 128 px": (),
    "response norm, 128 px": (LRN,),
    "batch norm, 64 px": AT_64,
    "response norm, 64 px": (*AT_64, LRN),
}
ALIKE = ("--set", "train.threads=1")  # in the comparison: the same sums on any number of cores
RECIPE = ("--config", ROOT / "configs" / "photos.toml")


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, work="photos, shards and runs; all are kept")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20, help="of the comparison (default: 20)")
    parser.add_argument("--variants", action="store_true", help="compare normalizations and sizes instead")
    arguments = parser.parse_args()
    machine, work = describe_machine("torch", "nvidia-dali-cuda130"), arguments.work
    for name, photos in (("photos", THREE), ("others", NINE)):
        if not (work / name).exists():
            write_disjoint_crops(work / name, photos)
    if arguments.variants:
        write_results(arguments.results, machine, compare_variants(work, arguments), "-variants")
        return
    result: dict[str, Any] = {"three_commands": three_commands(work)}
    prepare(work, "others")
    words = ("--data", work / "data-others", "--run", work / "run-others", "--overwrite", *ALIKE)
    command("trainer", "train", *RECIPE, *words)
    curves = []
    for seed in map(int, arguments.seeds.split(",")):
        for begin in ("new", "learned"):
            curves.append(curve(work, seed, begin, arguments.epochs))
            print(f"seed {seed}, {begin}: {curves[-1]['epochs_to_goal']} epochs to {GOAL}", flush=True)
    for begin in ("new", "learned"):
        reached = [row["epochs_to_goal"] or arguments.epochs + 1 for row in curves if row["begin"] == begin]
        result[f"epochs_to_goal_{begin}"] = spread(reached)
    result |= {"goal": GOAL, "epochs": arguments.epochs, "curves": curves}
    draw(curves, write_results(arguments.results, machine, result).with_suffix(".png"))


def command(*words: object) -> str:
    """Runs one of the project's commands; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def prepare(work: Path, name: str) -> None:
    """Class folders to a data set, as the README does it."""
    words = ("--input", work / name, "--output", work / f"data-{name}", "--resize", 144, "--val-fraction", 0.2)
    command("pipeline", "prepare", "--source", "folder", *words)


def three_commands(work: Path) -> dict[str, Any]:
    """The README's commands: seconds, seconds of processor time, and the share of held-out photos that are right."""
    run, rows = work / "run-photos", {}
    data = work / "data-photos"
    steps = {
        "prepare": lambda: prepare(work, "photos"),
        "train": lambda: command("trainer", "train", *RECIPE, "--data", data, "--run", run, "--overwrite"),
        "predict": lambda: command("trainer", "predict", work / "photos", "--run", run, "--html", work / "page.html"),
    }
    for name, step in steps.items():
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        step()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        rows[name] = {"wall_s": time.perf_counter() - began, "cpu_s": cpu_s}
    found = json.loads((run / "result.json").read_text())
    rows |= {"top1": found["top1"], "num_held_out": found["num_samples"], "steps": found["step"]}
    print(f"three commands: top-1 {found['top1']:.4f} of {found['num_samples']}", flush=True)
    return rows


def curve(work: Path, seed: int, begin: str, epochs: int) -> dict[str, Any]:
    """Trains on the three classes, from new weights or learned ones; held-out accuracy after every epoch."""
    run = work / f"{begin}-{seed}"
    words: list[object] = [*RECIPE, "--data", work / "data-photos", "--run", run, "--overwrite", *ALIKE]
    for change in (f"train.seed={seed}", f"train.epochs={epochs}", "train.evaluate_every_epochs=1"):
        words += ["--set", change]
    if begin == "learned":
        words += ["--init-from", work / "run-others", "--new-head"]
    command("trainer", "train", *words)
    with (run / "epochs.csv").open(encoding="utf-8") as file:
        top1 = [float(row["top1"]) for row in csv.DictReader(file)]
    reached = next((number for number, value in enumerate(top1, 1) if value > GOAL), None)
    return {"seed": seed, "begin": begin, "epochs_to_goal": reached, "top1": top1}


def compare_variants(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out accuracy of the last epoch on all twelve classes; mean and every seed."""
    if not (work / "all").exists():
        write_disjoint_crops(work / "all", THREE + NINE)
    prepare(work, "all")
    rows: dict[str, Any] = {}
    for name, changes in VARIANTS.items():
        for seed in map(int, arguments.seeds.split(",")):
            run = work / f"{name}-{seed}"
            words: list[object] = [*RECIPE, "--data", work / "data-all", "--run", run, "--overwrite", *ALIKE]
            for change in (*changes, f"train.seed={seed}", f"train.epochs={arguments.epochs}"):
                words += ["--set", change]
            command("trainer", "train", *words)
            found = json.loads((run / "result.json").read_text())
            rows.setdefault(name, []).append(found["top1"])
            print(f"{name}, seed {seed}: top-1 {found['top1']:.4f} of {found['num_samples']}", flush=True)
    return {"top1": {name: spread(values) for name, values in rows.items()}, "epochs": arguments.epochs}


def draw(curves: list[dict[str, Any]], path: Path) -> None:
    """Mean top-1 by epoch, with the seeds as thin lines."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for begin, color, label in (
        ("learned", "#2b6cb0", "begins with a run on nine other classes"),
        ("new", "#c05621", "begins with new weights"),
    ):
        rows = [row["top1"] for row in curves if row["begin"] == begin]
        epochs = np.arange(1, len(rows[0]) + 1)
        for row in rows:
            axes.plot(epochs, row, color=color, linewidth=0.7, alpha=0.45)
        axes.plot(epochs, np.mean(rows, axis=0), color=color, linewidth=2, label=label)
    axes.axhline(GOAL, color="#718096", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="epoch",
        ylabel="top-1 on 12 held-out photos",
        ylim=(0, 1.03),
        title=f"Three classes of 20 photos, configs/photos.toml, {CORES} CPU cores",
    )
    save_curves(figure, path)


if __name__ == "__main__":
    main()
