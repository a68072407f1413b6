"""Do the stages add up? The rate that ``python -m trainer bench`` predicts beside the measured one, in six cases.

    python benchmarks/stages.py --work /tmp/stages-bench            about 17 minutes on 2 cores
    python benchmarks/stages.py --work /tmp/stages-bench --count 128 --seconds 1       a smoke test

Cases: JPEG and raw shards of the same real photos (256 px), each for a net so small that data limit it (the digits'
structure on 28-px crops of them), with a core of its own and the other cores for the loader, and with as many threads
as cores for both; and for one that limits itself (the paper's, 224 px). Asked of each (issue 7): measured within 10 %
of predicted; end to end beside min(loader alone, synthetic alone), 0.95 where they do not share cores; of the digits:
training with metrics at 0.98 of training without, in turns within one process. Then the projection to 1, 2 and 4
processes beside what they do.

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

from trainer.bench.bottleneck import judge  # noqa: E402
from trainer.bench.prediction import costs_of, links_of, predict_rate, project  # noqa: E402
from trainer.bench.record import BenchRecord  # noqa: E402
from trainer.bench.run import describe_setting, make_record, measure_parts, print_line, run_bench  # noqa: E402
from trainer.bench.stages import BenchOptions  # noqa: E402
from trainer.bench.timing import TimedTrainer  # noqa: E402
from trainer.config import Config, load_config  # noqa: E402
from trainer.training.metrics import describe_environment  # noqa: E402

SMALL_NET = (
    "model.channels=3",
    "model.maps=[4, 4, 4, 4, 4]",
    "model.strides=[2, 1, 1, 1, 1]",
    "model.after=['relu norm pool', 'relu norm pool', 'relu', 'relu', 'relu']",
    "model.units=[32, 32]",
    "train.batch_size=128",
    "data.scale='255'",
)
# Two batches ahead, the usual, do not hide the end of an epoch from steps of 10 ms.
A_CORE_EACH = ("train.threads=1", f"data.threads={max(1, len(os.sched_getaffinity(0)) - 1)}", "data.prefetch=4")
PAPER_NET = ("model.classes=10", "train.batch_size=64", "optimizer.schedule='steps'")
ROUNDS = 9
METRICS_WARM_UP, METRICS_ROUNDS, METRICS_STEPS = 20, 20, 40


def recipes() -> dict[str, Config]:
    """The net that leaves most of the work to the data, and the one that limits itself."""
    return {
        "small net": load_config(ROOT / "configs" / "digits.toml", (*SMALL_NET, *A_CORE_EACH)),
        "small net, all threads": load_config(ROOT / "configs" / "digits.toml", SMALL_NET),
        "paper's net": load_config(ROOT / "configs" / "paper.toml", PAPER_NET),
    }


def run_case(name: str, config: Config, data: Path, seconds: float) -> tuple[BenchRecord, list[BenchRecord]]:
    """One case, and each of its rounds as a result of its own; the paper's steps take a second, so they get longer."""
    longer = seconds * 5 if name.startswith("paper") else seconds
    options = BenchOptions(data=data, seconds=longer, rounds=ROUNDS)
    (part,) = measure_parts(config, options, processes=1, device="cpu", say=print_line)
    setting = describe_setting(config, options, recipe=name, processes=1, device="cpu", parts=[part])
    rounds = [
        dataclasses.replace(part, slots={key: [slots[number]] for key, slots in part.slots.items()})
        for number in range(ROUNDS)
    ]
    return make_record(config, setting, [part]), [make_record(config, setting, [one]) for one in rounds]


def facts_of(record: BenchRecord, rounds: list[BenchRecord]) -> dict[str, Any]:
    """What the issue asks of a case; ratios are taken within rounds, for machines drift."""
    assert record.whole and record.loader
    to_predicted, to_slower = [], []
    for one in rounds:
        assert one.whole and one.loader
        to_predicted.append(one.whole.images_per_s / predict_rate(one))
        to_slower.append(one.whole.images_per_s / min(one.loader.images_per_s, one.synthetic.images_per_s))
    predicted, slower = predict_rate(record), min(record.loader.images_per_s, record.synthetic.images_per_s)
    verdict = judge(record)
    return {
        "predicted_images_per_s": predicted,
        "measured_images_per_s": record.whole.images_per_s,
        "measured / predicted (wanted 0.9..1.1)": statistics.median(to_predicted),
        "end to end / min(loader, synthetic)": statistics.median(to_slower),
        "each round": {"measured / predicted": to_predicted, "end to end / min(loader, synthetic)": to_slower},
        "of medians": {
            "measured / predicted": record.whole.images_per_s / predicted,
            "end to end / min(loader, synthetic)": record.whole.images_per_s / slower,
        },
        "processor time, end to end / (loader + synthetic)": record.whole.cpu_ms
        / (record.loader.cpu_ms + record.synthetic.cpu_ms),
        "limit": verdict.limit,
        "side": verdict.side,
        "sentence": verdict.sentence,
        "suggestions": [dataclasses.asdict(suggestion) for suggestion in verdict.suggestions],
        "costs": dataclasses.asdict(costs_of(record)),
    }


def metrics_cost() -> dict[str, Any]:
    """Training with metrics beside training without: two trainers take single steps in turns, digits, synthetic.

    A round's ratio is that of the medians of its steps; the processor time is that of the process, all threads.
    """
    config = load_config(ROOT / "configs" / "digits.toml")
    times: dict[bool, list[float]] = {True: [], False: []}
    spent: dict[bool, float] = {True: 0.0, False: 0.0}
    with contextlib.ExitStack() as stack:
        trainers = {}
        for metrics in (True, False):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            trainers[metrics] = TimedTrainer(config, None, folder, mesh=None, device="cpu", metrics=metrics)
            stack.callback(trainers[metrics].end)
        for number in range(-METRICS_WARM_UP, METRICS_ROUNDS * METRICS_STEPS):
            for metrics in (True, False) if number % 2 else (False, True):
                slot = trainers[metrics].run_steps("synthetic", 1)
                if number >= 0:
                    times[metrics].append(slot.wall_s)
                    spent[metrics] += slot.cpu_s
    medians = {
        metrics: [statistics.median(rows[i : i + METRICS_STEPS]) for i in range(0, len(rows), METRICS_STEPS)]
        for metrics, rows in times.items()
    }
    ratios = [off / on for on, off in zip(medians[True], medians[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "with / without (wanted 0.98)": middle,
        "half within": [low, high],
        "by processor time": spent[False] / spent[True],
        "step_ms": {"with": 1e3 * statistics.median(times[True]), "without": 1e3 * statistics.median(times[False])},
        "ratios": ratios,
    }


def scaling(seconds: float) -> dict[str, Any]:
    """The projection for 1, 2 and 4 processes that share this machine, beside synthetic training measured with them."""
    config = load_config(ROOT / "configs" / "paper.toml", PAPER_NET)
    options = BenchOptions(data=None, seconds=seconds)
    record = run_bench(config, options, recipe="paper's net", processes=2, scaling=(1, 2, 4))
    rows = {}
    for point in record.scaling:
        predicted = project(record, point.x, links_of(record)).images_per_s
        rows[point.x] = {"predicted": predicted, "measured": point.images_per_s}
        rows[point.x]["measured / predicted"] = point.images_per_s / predicted
    return {"processes": rows, "record": dataclasses.asdict(record)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the data sets are made and kept")
    parser.add_argument("--count", type=int, default=4096, help="pictures; of few, the ends of the epochs show")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement of a case")
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
            records[name], rounds = run_case(name, config, folder, args.seconds)
            cases[name] = facts_of(records[name], rounds)
            measured, predicted = cases[name]["measured_images_per_s"], cases[name]["predicted_images_per_s"]
            ratio = cases[name]["measured / predicted (wanted 0.9..1.1)"]
            print(f"{name:28} predicted {predicted:8,.1f}, measured {measured:8,.1f} images/s", end="  ")
            print(f"{ratio:.2f}  limit: {cases[name]['limit']} ({cases[name]['side']})", flush=True)
    scaled = {} if args.only else scaling(args.seconds * 2)
    for processes, row in scaled.get("processes", {}).items():
        print(f"{processes} processes: projected {row['predicted']:.1f}, measured {row['measured']:.1f} images/s")
    metrics = metrics_cost()
    print(f"training with metrics at {metrics['with / without (wanted 0.98)']:.3f} of training without")
    cores = len(os.sched_getaffinity(0))
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    facts = {
        **describe_environment(["python", "benchmarks/stages.py", *sys.argv[1:]]),
        "load_before": load,
        "cases": cases,
        "metrics": metrics,
        "scaling": scaled,
        "records": {name: dataclasses.asdict(record) for name, record in records.items()},
    }
    output = args.output or ROOT / "benchmarks" / "results" / f"{date}_cpu{cores}_stages.json"
    output.write_text(json.dumps(facts, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
