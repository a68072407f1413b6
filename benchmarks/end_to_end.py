"""Do the stages add up? The rate that ``python -m trainer bench`` predicts beside the measured one, in six cases.

    python benchmarks/end_to_end.py --work /tmp/end-to-end            about 17 minutes on 2 cores
    python benchmarks/end_to_end.py --work /tmp/end-to-end --count 256 --seconds 1       a smoke test

Cases: JPEG and raw shards of the same real photos (256 px), each for a net so small that data limit it (the digits'
structure on 28-px crops of them), with a core of its own and the other cores for the loader, and with as many threads
as cores for both; and for one that limits itself (the paper's, 224 px). Of each case: the measured rate over the
predicted one, and over min(loader alone, synthetic alone). Of the digits: training with metrics over training without,
in turns within one process. Then the projection to 1, 2 and 4 processes beside what they do. The results go to
benchmarks/results/DATE_MACHINE_end_to_end.json.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import CORES, ROOT, describe_machine, make_parser, ratio, write_results
from photos import prepare_shards

from trainer.bench.bottleneck import judge
from trainer.bench.measure import BenchSettings
from trainer.bench.prediction import costs_of, links_of, predict_rate, project
from trainer.bench.record import BenchRecord
from trainer.bench.run import describe_workload, make_record, measure_parts, print_line, run_bench
from trainer.bench.timing import TimedTrainer
from trainer.config import Config, load_config

SMALL_NET = (
    "model.in_channels=3",
    "model.channels=[4, 4, 4, 4, 4]",
    "model.strides=[2, 1, 1, 1, 1]",
    "model.post_ops=[['relu', 'lrn', 'maxpool'], ['relu', 'lrn', 'maxpool'], ['relu'], ['relu'], ['relu']]",
    "model.hidden=[32, 32]",
    "train.batch_size=128",
    "data.normalize='none'",
)
# Two batches ahead, the usual, do not hide the end of an epoch from steps of 10 ms.
A_CORE_EACH = ("train.threads=1", f"data.threads={max(1, CORES - 1)}", "data.prefetch=4")
PAPER_NET = ("model.classes=10", "train.batch_size=64", "optimizer.schedule='steps'", "train.precision='fp32'")
METRICS_WARM_UP, METRICS_ROUNDS, METRICS_STEPS = 20, 20, 40


def recipes() -> dict[str, Config]:
    """The net that leaves most of the work to the data, and the one that limits itself."""
    return {
        "small net": load_config(ROOT / "configs" / "digits.toml", (*SMALL_NET, *A_CORE_EACH)),
        "small net, all threads": load_config(ROOT / "configs" / "digits.toml", SMALL_NET),
        "paper's net": load_config(ROOT / "configs" / "paper.toml", PAPER_NET),
    }


def run_case(
    name: str, config: Config, data: Path, seconds: float, rounds: int
) -> tuple[BenchRecord, list[BenchRecord]]:
    """One case, and each of its rounds as a result of its own; the paper's steps take a second, so they get longer."""
    longer = seconds * 5 if name.startswith("paper") else seconds
    settings = BenchSettings(data=data, seconds=longer, rounds=rounds)
    (part,) = measure_parts(config, settings, processes=1, device="cpu", say=print_line)
    workload = describe_workload(config, settings, recipe=name, processes=1, device="cpu", parts=[part])
    alone = [
        dataclasses.replace(part, intervals={key: [rows[number]] for key, rows in part.intervals.items()})
        for number in range(rounds)
    ]
    return make_record(config, workload, [part]), [make_record(config, workload, [one]) for one in alone]


def facts_of(record: BenchRecord, rounds: list[BenchRecord]) -> dict[str, Any]:
    """What the script asks of a case; ratios are taken within rounds, for machines drift."""
    assert record.end_to_end and record.loader
    measured = [one.training.images_per_s for one in rounds]
    slower = [min(one.loader.images_per_s, one.synthetic.images_per_s) for one in rounds if one.loader]
    both_ms = record.loader.cpu_ms + record.synthetic.cpu_ms
    return {
        "predicted_images_per_s": predict_rate(record),
        "measured_images_per_s": record.end_to_end.images_per_s,
        "measured / predicted": ratio(measured, [predict_rate(one) for one in rounds]),
        "end to end / min(loader, synthetic)": ratio(measured, slower),
        "processor time, end to end / (loader + synthetic)": record.end_to_end.cpu_ms / both_ms,
        **dataclasses.asdict(judge(record)),
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
                begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
                trainers[metrics].run_steps("synthetic", 1)
                if number >= 0:
                    times[metrics].append(time.perf_counter() - begin_s)
                    spent[metrics] += time.process_time() - begin_cpu_s
    medians = {
        metrics: [statistics.median(rows[i : i + METRICS_STEPS]) for i in range(0, len(rows), METRICS_STEPS)]
        for metrics, rows in times.items()
    }
    return {
        "with / without": ratio(medians[False], medians[True]),  # of rates, so times the other way round
        "by processor time": spent[False] / spent[True],
        "step_ms": {"with": 1e3 * statistics.median(times[True]), "without": 1e3 * statistics.median(times[False])},
    }


def scaling(seconds: float) -> dict[str, Any]:
    """The projection for 1, 2 and 4 processes that share this machine, beside synthetic training measured with them."""
    config = load_config(ROOT / "configs" / "paper.toml", PAPER_NET)
    settings = BenchSettings(data=None, seconds=seconds)
    record = run_bench(config, settings, recipe="paper's net", processes=2, scaling=(1, 2, 4))
    rows = {}
    for count, measured in record.scaling.items():
        predicted = project(record, count, links_of(record)).images_per_s
        rows[count] = {"predicted": predicted, "measured": measured.median}
        rows[count]["measured / predicted"] = measured.median / predicted
    return {"processes": rows, "record": dataclasses.asdict(record)}


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__, work="the data sets, which are made once and kept", rounds=9)
    parser.add_argument("--count", type=int, default=4096, help="images; of few, the ends of the epochs show")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement of a case")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this, and no scaling")
    args = parser.parse_args()
    machine = describe_machine("torch", "nvidia-dali-cuda130", "numpy")
    folders = prepare_shards(args.work, args.count, val_fraction=0.05)
    cases, records = {}, {}
    for net, config in recipes().items():
        for encoding, folder in folders.items():
            name = f"{net}, {encoding}"
            if args.only in name:
                records[name], rounds = run_case(name, config, folder, args.seconds, args.rounds)
                case = cases[name] = facts_of(records[name], rounds)
                print(
                    f"{name:28} predicted {case['predicted_images_per_s']:8,.1f}, measured "
                    f"{case['measured_images_per_s']:8,.1f} images/s  {case['measured / predicted']['median']:.2f}  "
                    f"limit: {case['limit']} ({case['side']})",
                    flush=True,
                )
    scaled = {} if args.only else scaling(args.seconds * 2)
    for processes, row in scaled.get("processes", {}).items():
        print(f"{processes} processes: projected {row['predicted']:.1f}, measured {row['measured']:.1f} images/s")
    metrics = metrics_cost()
    print(f"training with metrics at {metrics['with / without']['median']:.3f} of training without")
    result = {"cases": cases, "metrics": metrics, "scaling": scaled}
    result["records"] = {name: dataclasses.asdict(record) for name, record in records.items()}
    write_results(args.results, machine, result)


if __name__ == "__main__":
    main()
