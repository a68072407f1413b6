"""How good, and how soon? configs/fashion.toml on Fashion-MNIST, two towers in two processes, several seeds.

    python benchmarks/fashion_mnist.py --work /tmp/fashion --input FOLDER                     12 minutes a seed
    python benchmarks/fashion_mnist.py --work /tmp/fashion --input FOLDER --seeds 0 --epochs 1     a try

FOLDER holds the four IDX files (Debian's package dataset-fashion-mnist: /usr/share/datasets/fashion-mnist). Prepares
the shards once, trains a run a seed, evaluates the last checkpoint of each on the 10,000 test images, with the center
crop and with ten views. A run that is finished already is not repeated: its figures are read from its folder, with what
it says about its commit and machine.
Results: benchmarks/results/DATE_MACHINE_fashion_mnist.json, and the curves beside it as .png.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
from harness import CORES, ROOT, describe_machine, make_parser, save_curves, spread, write_results


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, work="shards and runs; both are kept")
    parser.add_argument("--input", type=Path, required=True, help="folder with the IDX files")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    machine = describe_machine("torch")
    data = arguments.work / "fashion"
    prepared = command("pipeline", "prepare", "--source", "fashion-mnist", "--input", arguments.input, "--output", data)
    runs = []
    for seed in map(int, arguments.seeds.split(",")):
        run = arguments.work / f"seed{seed}"
        train(run, data, seed, arguments.epochs)
        runs.append(figures(run, data, seed))
        print(f"seed {seed}: top-1 {runs[-1]['top1']:.4f}, {runs[-1]['minutes']:.1f} min", flush=True)
    result = {
        "prepare": [line for line in prepared.splitlines() if "prepared" in line][-1:],
        "top1": spread([run["top1"] for run in runs]),
        "minutes": spread([run["minutes"] for run in runs]),
        "runs": runs,
    }
    draw(runs, write_results(arguments.results, machine, result).with_suffix(".png"))


def command(*words: object) -> str:
    """Runs one of the project's commands; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def train(run: Path, data: Path, seed: int, epochs: int | None) -> None:
    """Trains a run to its end, unless it is there."""
    result = run / "result.json"
    if result.exists() and json.loads(result.read_text())["exit_reason"] == "finished":
        return
    words: list[object] = ["trainer", "train", "--config", ROOT / "configs" / "fashion.toml", "--processes", 2]
    words += ["--data", data, "--run", run, "--set", f"train.seed={seed}", "--resume", "auto"]
    command(*words, *(["--set", f"train.epochs={epochs}"] if epochs else []))


def figures(run: Path, data: Path, seed: int) -> dict[str, Any]:
    """What a run came to, and its curve."""
    result, environment = (json.loads((run / name).read_text()) for name in ("result.json", "environment.json"))
    ten = json.loads(command("trainer", "evaluate", "--run", run, "--data", data, "--views", "ten", "--json"))
    with (run / "epochs.csv").open(encoding="utf-8") as file:
        curve = [{"epoch": int(row["epoch"]), "top1": float(row["top1"])} for row in csv.DictReader(file)]
    return {
        "seed": seed,
        "top1": result["top1"],
        "top1_ten_views": ten["top1"],
        "num_samples": result["num_samples"],
        "minutes": result["elapsed_s"] / 60,
        "images_per_s": result["images_per_s"],
        "environment": environment,
        "curve": curve,
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Top-1 by epoch, a line a seed."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for run, color in zip(runs, ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#718096"), strict=False):
        epochs, top1 = zip(*((row["epoch"], row["top1"]) for row in run["curve"]), strict=True)
        axes.plot(epochs, top1, marker="o", markersize=3, color=color, label=f"seed {run['seed']}: {run['top1']:.4f}")
    axes.set(
        xlabel="epoch",
        ylabel="top-1 on the 10,000 test images",
        title=f"Fashion-MNIST, two towers, {CORES} CPU cores",
    )
    save_curves(figure, path)


if __name__ == "__main__":
    main()
