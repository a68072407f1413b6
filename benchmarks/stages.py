"""Do the stages add up? The rate that ``python -m trainer bench`` predicts beside the measured one, in four cases.

    python benchmarks/stages.py --work /tmp/stages-bench            about 6 minutes on 2 cores
    python benchmarks/stages.py --work /tmp/stages-bench --count 128 --seconds 1       a smoke test

Cases: JPEG and raw shards of the same real photos (256 px), each for a net so small that data take most of the
processor's time (the digits' structure on 28-px crops of them) and for one that limits itself (the paper's, 224 px).
Asked of each (issue 7): measured within 10 % of predicted; end to end beside min(loader alone, synthetic alone), 0.95
where they do not share cores; and of the digits: training with metrics at 0.98 of training without, in turns within
one process.

The results go to benchmarks/results/DATE_HARDWARE_stages.json.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from photos import prepare_shards

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.bench import run_bench  # noqa: E402
from trainer.bench_model import costs_of, predict_rate  # noqa: E402
from trainer.bench_record import BenchRecord  # noqa: E402
from trainer.bench_stages import BenchOptions  # noqa: E402
from trainer.bench_timing import TimedTrainer  # noqa: E402
from trainer.bench_verdict import judge  # noqa: E402
from trainer.config import Config, load_config  # noqa: E402
from trainer.metrics import describe_environment  # noqa: E402

SMALL_NET = (
    "model.channels=3",
    "model.maps=[4, 4, 4, 4, 4]",
    "model.strides=[2, 1, 1, 1, 1]",
    "model.after=['relu norm pool', 'relu norm pool', 'relu', 'relu', 'relu']",
    "model.units=32",
    "train.batch_size=128",
    "data.scale='255'",
)
PAPER_NET = ("model.classes=10", "train.batch_size=64", "optimizer.schedule='steps'")
METRICS_ROUNDS, METRICS_STEPS = 11, 20


def recipes() -> dict[str, Config]:
    """The net that leaves most of the work to the data, and the one that limits itself."""
    return {
        "small net": load_config(ROOT / "configs" / "digits.toml", SMALL_NET),
        "paper's net": load_config(ROOT / "configs" / "paper.toml", PAPER_NET),
    }


def run_case(name: str, config: Config, data: Path, seconds: float) -> BenchRecord:
    """One case; the paper's steps take a second each, so they get longer."""
    longer = seconds * 2 if name.startswith("paper") else seconds
    return run_bench(config, BenchOptions(data=data, seconds=longer), recipe=name, processes=1)


def facts_of(record: BenchRecord) -> dict[str, Any]:
    """What the issue asks of a case."""
    assert record.whole and record.loader
    predicted, slower = predict_rate(record), min(record.loader.images_per_s, record.synthetic.images_per_s)
    verdict = judge(record)
    return {
        "predicted_images_per_s": predicted,
        "measured_images_per_s": record.whole.images_per_s,
        "measured / predicted (wanted 0.9..1.1)": record.whole.images_per_s / predicted,
        "end to end / min(loader, synthetic)": record.whole.images_per_s / slower,
        "processor time, end to end / (loader + synthetic)": record.whole.cpu_ms
        / (record.loader.cpu_ms + record.synthetic.cpu_ms),
        "limit": verdict.limit,
        "side": verdict.side,
        "sentence": verdict.sentence,
        "costs": dataclasses.asdict(costs_of(record)),
    }


def metrics_cost() -> dict[str, Any]:
    """Training with metrics beside training without: two trainers take turns on the digits' recipe, synthetic."""
    config = load_config(ROOT / "configs" / "digits.toml")
    rates: dict[bool, list[float]] = {True: [], False: []}
    with contextlib.ExitStack() as stack:
        trainers = {}
        for metrics in (True, False):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            trainers[metrics] = TimedTrainer(config, None, folder, mesh=None, device="cpu", metrics=metrics)
            stack.callback(trainers[metrics].end)
        for number in range(METRICS_ROUNDS + 1):
            for metrics in (True, False) if number % 2 else (False, True):
                slot = trainers[metrics].run_steps("synthetic", METRICS_STEPS)
                if number:  # the first round warms up
                    rates[metrics].append(METRICS_STEPS * config.train.batch_size / slot.wall_s)
    ratios = [on / off for on, off in zip(rates[True], rates[False], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"with / without (wanted 0.98)": quartiles[1], "half within": [quartiles[0], quartiles[2]], "ratios": ratios}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the data sets are made and kept")
    parser.add_argument("--count", type=int, default=1024, help="pictures")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement of a case")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE_cpuN_stages.json")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    folders = prepare_shards(args.work, args.count, val_fraction=0.05)
    cases, records = {}, {}
    for net, config in recipes().items():
        for encoding, folder in folders.items():
            name = f"{net}, {encoding}"
            if args.only not in name:
                continue
            records[name] = run_case(name, config, folder, args.seconds)
            cases[name] = facts_of(records[name])
            measured, predicted = cases[name]["measured_images_per_s"], cases[name]["predicted_images_per_s"]
            print(f"{name:20} predicted {predicted:8,.1f}, measured {measured:8,.1f} images/s", end="  ")
            print(f"{measured / predicted:.2f}  limit: {cases[name]['limit']} ({cases[name]['side']})", flush=True)
    metrics = metrics_cost()
    print(f"training with metrics at {metrics['with / without (wanted 0.98)']:.3f} of training without")
    cores = len(os.sched_getaffinity(0))
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    facts = {
        **describe_environment(["python", "benchmarks/stages.py", *sys.argv[1:]]),
        "load_before": load,
        "cases": cases,
        "metrics": metrics,
        "records": {name: dataclasses.asdict(record) for name, record in records.items()},
    }
    output = args.output or ROOT / "benchmarks" / "results" / f"{date}_cpu{cores}_stages.json"
    output.write_text(json.dumps(facts, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
