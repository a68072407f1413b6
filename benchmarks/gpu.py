"""Everything about one GPU, in at most six minutes: the step, its kernels, the loader, end to end, two ranks.

    python benchmarks/gpu.py                               on a machine with a GPU
    python benchmarks/gpu.py --parts step,loader --seconds 1
    python benchmarks/gpu.py --device cpu --smoke          all parts at tiny sizes, to try the script; no figure of use

Parts; what the project is held against comes first, so that it is measured where time runs out:

    data        photos of 256 px, made here, as JPEG and raw shards, by prepare's own writer; no Ray
    ceilings    matrix products, copies of memory, from the host
    step        forward, backward and update by batch size, bf16 and fp32, in one CUDA graph as in training and kernel
                by kernel, beside plain modules (eager float32; bf16 autocast and channels_last), in turns
    compile     plain modules under ``torch.compile``, bf16, channels_last, beside ours in turns
    loop        the same within the trainer's own loop, on synthetic images (``trainer bench --synthetic``)
    loader      ``pipeline bench``: reading, decoding, everything; hw_decoder_load; beside a bare DALI pipeline
    end_to_end  training on raw and on JPEG shards beside loader and synthetic training
    kernels     where a step goes, by the profiler; our kernels beside their bytes at the speed of this card's memory
    two         a process per tower, both on this card: gloo, and NCCL

A part whose package is missing is left out with a line, and so is what would end after ``--limit`` seconds. Results:
benchmarks/results/DATE_MACHINE_gpu-CARD.json, and the same as Markdown tables beside it.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from gpu_budget import Budget
from gpu_table import to_markdown

os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # before torch is imported: its profiler chatters otherwise

PARTS = ("data", "ceilings", "step", "compile", "loop", "loader", "end_to_end", "kernels", "two")
PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "nvidia-nccl-cu13", "numpy")
MORE_HARDWARE = 0.75  # of JPEGs: the loader alone is a little slower than at its default, and leaves the GPU to the net
SMALL = (
    "model.image_px=67",
    "model.channels=[6, 8, 8, 8, 8]",
    "model.hidden=[16, 16]",
    "train.threads=1",
    "data.threads=1",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything; tiny ones to try the script.

    Attributes:
        batches: of steps.
        images: of the data set, ``side_px`` wide.
        loader_batch: images.
        matrix: side of the matrices that are multiplied.
        steps: to warm up with, and to look at with the profiler.
        compiled: batch and mode of ``torch.compile``.
        overrides: of the paper's recipe.
    """

    batches: tuple[int, ...] = (128, 256, 512, 1024)
    images: int = 12_800
    side_px: int = 256
    loader_batch: int = 256
    matrix: int = 8192
    steps: int = 5
    compiled: tuple[tuple[int, str], ...] = ((128, "default"), (1024, "default"), (128, "reduce-overhead"))
    overrides: tuple[str, ...] = ()


TINY = Sizes((2,), 24, 72, 8, 64, 1, ((2, "default"),), SMALL)


class Bench:
    """The parts.

    Args:
        options: the command line's.
        sizes: how much of everything.
        work: folder for the data sets.
    """

    def __init__(self, options: argparse.Namespace, sizes: Sizes, work: Path) -> None:
        from trainer.config import load_config

        self.device, self.seconds, self.rounds = options.device, options.seconds, options.rounds
        self.sizes, self.work = sizes, work
        fixed = ("model.classes=1000", "model.in_channels=3", "optimizer.learning_rate=1e-6", "train.precision=bf16")
        fixed += ("train.start_timeout_s=60", "train.peer_timeout_s=20")  # two ranks that do not meet cost a minute
        threads = f"data.threads={min(16, harness.CORES)}"
        self.config = load_config(harness.ROOT / "configs" / "paper.toml", (*fixed, threads, *sizes.overrides))
        self.folders: dict[str, Path] = {}
        self._rates_only: dict[str, Any] = {"stages": False, "phases": False, "rounds": options.rounds}

    def measure(self, budget: Budget) -> None:
        """All parts, in their order; some cases that matter less come last."""
        ends = dict.fromkeys((self.sizes.batches[0], self.sizes.batches[-1]))
        *compiled, last_compiled = self.sizes.compiled
        budget.run("data", self.data)
        budget.run("ceilings", self.ceilings)
        for batch in ends:
            budget.run(f"step: {batch}", lambda batch=batch: self.step(batch))
        for case in compiled:
            self.run_compiled(budget, *case)
        budget.run("loop", self.loop)
        for encoding in ("raw", "jpeg"):
            budget.run(f"loader: {encoding}", lambda encoding=encoding: self.loader(encoding))
        for encoding in ("raw", "jpeg"):
            budget.run(f"end_to_end: {encoding}", lambda encoding=encoding: self.end_to_end(encoding))
        for batch in ends:
            budget.run(f"kernels: of a step, {batch}", lambda batch=batch: self.step_kernels(batch))
        budget.run(f"kernels: ours, {self.sizes.batches[-1]}", self.our_kernels)
        if self.device == "cpu":
            budget.leave_out("two: nccl", "NCCL needs a GPU")
        else:
            budget.run("two: nccl", lambda: self.two("nccl"))
        for batch in self.sizes.batches[1:-1]:
            budget.run(f"step: {batch}", lambda batch=batch: self.step(batch))
        budget.run("two: gloo", lambda: self.two("gloo"))
        if self.device != "cpu":  # the decoder that is not the net's neighbor
            name = f"end_to_end: jpeg, hw_decoder_load {MORE_HARDWARE:g}"
            budget.run(name, lambda: self.end_to_end("jpeg", MORE_HARDWARE))
        self.run_compiled(budget, *last_compiled)

    def run_compiled(self, budget: Budget, batch: int, mode: str) -> None:
        """One case of ``compile``."""
        budget.run(f"compile: {batch}, {mode}", lambda: self.compiled(batch, mode))

    def data(self) -> dict[str, Any]:
        """The data sets."""
        import gpu_shards

        self.folders = gpu_shards.make_shards(self.work, self.sizes.images, self.sizes.side_px)
        stored = {
            name: sum(tar.stat().st_size for tar in path.glob("train/*.tar")) for name, path in self.folders.items()
        }
        return {"images": self.sizes.images, "side_px": self.sizes.side_px, "bytes": stored}

    def ceilings(self) -> dict[str, float]:
        """What the card can."""
        import gpu_cases as cases

        return cases.matrix_rates(("bf16", "tf32", "fp32"), self.device, self.sizes.matrix)

    def step(self, batch: int) -> dict[str, Any]:
        """Images/s of ours and of plain modules."""
        import gpu_cases as cases

        found = {}
        for precision in ("bf16", "fp32"):  # three nets at a time are enough for the card's memory
            ours = (self.config, batch, precision, self.device)
            steps = {
                f"ours {precision}": cases.our_step(*ours),
                f"ours {precision}, kernel by kernel": cases.our_step(*ours, graph=False),
                f"plain {precision}": cases.plain_step(*ours),
            }
            found |= self._rates(steps, batch)
            del steps
            cases.release()
        ratios = {p: found[f"ours {p}"]["median"] / found[f"plain {p}"]["median"] for p in ("bf16", "fp32")}
        return {"images_per_s": found, "ours / plain": ratios}

    def _rates(self, steps: Mapping[str, Any], batch: int) -> dict[str, Any]:
        import gpu_cases as cases

        length = {"seconds": self.seconds / 3, "rounds": self.rounds, "warm_up": self.sizes.steps}
        return cases.steps_rates(steps, batch, device=self.device, **length)

    def compiled(self, batch: int, mode: str) -> dict[str, Any]:
        """Images/s of plain modules under torch.compile, and of ours in turns."""
        import gpu_cases as cases
        import torch

        begin = time.perf_counter()
        steps = {
            "compiled bf16": cases.plain_step(self.config, batch, "bf16", self.device, mode),
            "ours bf16": cases.our_step(self.config, batch, "bf16", self.device),
        }
        steps["compiled bf16"](0)
        cases.synchronize(self.device)
        took_s = time.perf_counter() - begin
        found = self._rates(steps, batch)
        del steps
        torch._dynamo.reset()
        cases.release()
        ratio = found["ours bf16"]["median"] / found["compiled bf16"]["median"]
        return {"images_per_s": found, "ours / compiled": ratio, "compiling_s": took_s}

    def loop(self) -> dict[str, Any]:
        """Images/s of the trainer's loop, by batch size."""
        from trainer.bench.measure import BenchSettings

        first, *others = self.sizes.batches
        settings = BenchSettings(None, self.seconds, tuple(others), **self._rates_only)
        (part,) = self._parts(first, settings)
        rates = {first: [first / s for s in part.seconds_per_step("synthetic")]}
        rates |= {size: [size / s for s in seconds] for size, seconds in part.sweep.items()}
        return {"images_per_s": {str(size): harness.spread(values) for size, values in rates.items()}}

    def step_kernels(self, batch: int) -> dict[str, Any]:
        """The profiler's table."""
        import gpu_cases as cases

        found = cases.step_kernels(
            cases.our_step(self.config, batch, "bf16", self.device, graph=False), self.device, self.sizes.steps
        )
        cases.release()
        return found

    def our_kernels(self) -> dict[str, Any]:
        """Each kernel beside its floor; without a GPU, what it takes of the chip that it is compiled for."""
        import gpu_kernels
        import torch

        from tests.helpers.gpu_compile import paper_kernels

        batch, on_gpu = self.sizes.batches[-1], self.device != "cpu"
        capability = (
            10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1] if on_gpu else 90
        )
        rate = gpu_kernels.measure_copy() if on_gpu else gpu_kernels.H100_GB_PER_S
        launches = gpu_kernels.make_launches(batch, "bf16") if on_gpu else {}
        kernels = paper_kernels("bf16", batch)
        rows = [gpu_kernels.describe(case, capability, rate) for case in (kernels if on_gpu else kernels[:1])]
        for row in rows:
            if row["kernel"] in launches:
                row["ms"] = gpu_kernels.time_ms(launches[row["kernel"]], self.rounds)
                row["times_floor"] = row["ms"] / row["floor_ms"]
        return {"gb_per_s": rate, "kernels": rows}

    def loader(self, encoding: str) -> dict[str, Any]:
        """Images/s by stage, by hw_decoder_load, and of bare DALI."""
        import gpu_cases as cases

        from pipeline.loader.bench import BenchOptions, run_bench

        folder, batch, px = self.folders[encoding], self.sizes.loader_batch, self.config.model.image_px
        sweep = encoding == "jpeg" and self.device != "cpu"
        options = BenchOptions(self.device, batch, self.seconds / 3, self.rounds, sweep=sweep)
        ours = run_bench(folder, self.config.data, options)
        shares = ours.hw_decoder_images_per_s or {}
        best = float(max(shares, key=lambda share: shares[share])) if shares else self.config.data.hw_decoder_load
        bare = {}
        for mean in ("image", "channel"):
            batches = cases.bare_dali(folder, batch, self.device, px, best, mean)
            bare[mean] = cases.batches_rate(
                batches, batch, seconds=self.seconds / 3, rounds=self.rounds, settle=30 if self.device != "cpu" else 2
            )
            batches.close()  # type: ignore[attr-defined]
            cases.release()
        whole = next(stage.images_per_s for stage in ours.stages if stage.name == "whole")
        return {
            "stages": [dataclasses.asdict(stage) for stage in ours.stages],
            "hw_decoder_images_per_s": shares,
            "bare": bare,
            "whole / bare": whole / bare["image"]["median"],
        }

    def end_to_end(self, encoding: str, hw_decoder_load: float | None = None) -> dict[str, Any]:
        """Images/s of training, of its loader, and of training without one, in turns."""
        from trainer.bench.measure import BenchSettings

        batch = self.sizes.batches[0]
        settings = BenchSettings(self.folders[encoding], 2 * self.seconds, **self._rates_only)
        (part,) = self._parts(batch, settings, hw_decoder_load=hw_decoder_load)
        names = ("loader", "synthetic", "end to end")
        rates = {name: [batch / s for s in part.seconds_per_step(name)] for name in names}
        slower = [min(pair) for pair in zip(rates["loader"], rates["synthetic"], strict=True)]
        return {
            "batch": batch,
            "images_per_s": {name: harness.spread(values) for name, values in rates.items()},
            "end to end / min(loader, synthetic)": harness.ratio(rates["end to end"], slower),
            "end to end / loader": harness.ratio(rates["end to end"], rates["loader"]),
        }

    def two(self, backend: str) -> dict[str, Any]:
        """Images/s of two processes on this card, and what the exchange holds the towers up."""
        from trainer.bench.measure import BenchSettings

        batch = self.sizes.batches[0]
        settings = BenchSettings(None, self.seconds, **self._rates_only)
        parts = self._parts(batch, settings, processes=2, backend=backend)
        slower = [max(row) for row in zip(*(part.seconds_per_step("synthetic") for part in parts), strict=True)]
        return {"batch": batch, "images_per_s": harness.spread([batch / seconds for seconds in slower])}

    def _parts(
        self,
        batch: int,
        settings: Any,
        processes: int = 1,
        backend: str = "auto",
        hw_decoder_load: float | None = None,
    ) -> list[Any]:
        import gpu_cases as cases

        from trainer.bench.run import measure_parts

        cases.release()
        train = dataclasses.replace(self.config.train, batch_size=batch)
        data = self.config.data
        if hw_decoder_load is not None:
            data = dataclasses.replace(data, hw_decoder_load=hw_decoder_load)
        config = dataclasses.replace(self.config, train=train, data=data)
        quiet = lambda _: None  # noqa: E731
        device = self.device if self.device == "cpu" or ":" in self.device else f"{self.device}:0"
        return measure_parts(config, settings, processes=processes, device=device, backend=backend, say=quiet)


def main() -> int:
    """Command line; the exit status: 2 without a GPU, 1 where a part failed."""
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--device", default="cuda:0", help="cuda:N; cpu goes with --smoke (cuda:0)")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="PART,PART", help="only these")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help="of a measurement, all rounds (1.5)")
    parser.add_argument("--limit", type=float, default=355.0, metavar="S", help="all is ready by then, about (355)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="empty folder for the data sets; default: a temporary one"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: tries the script")
    options = parser.parse_args()
    parts = tuple(part for part in options.parts.split(",") if part)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts {unknown[0]}: expected some of {', '.join(PARTS)}")
    os.chdir(harness.ROOT)  # the processes that are started are python -m trainer
    import torch

    if options.device == "cpu" and not options.smoke:
        parser.error("--device cpu goes with --smoke: benchmarks/step_speed.py measures CPUs")
    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            f"error: --device {options.device}: torch sees no GPU here; "
            "--device cpu --smoke tries the script without one",
            file=sys.stderr,
        )
        return 2
    if options.device == "cpu":
        torch.set_num_threads(1)
    machine = harness.describe_machine(*(name for name in PACKAGES if is_installed(name)))
    card = describe_card(options.device)
    budget = Budget(options.limit, parts)
    try:
        with tempfile.TemporaryDirectory(prefix="twotower-gpu-") as folder:
            Bench(options, TINY if options.smoke else Sizes(), options.work or Path(folder)).measure(budget)
    finally:  # also what was measured before Ctrl-C
        write(options, machine, card, budget)
    return 1 if budget.failed else 0


def write(options: argparse.Namespace, machine: Mapping[str, Any], card: Mapping[str, Any], budget: Budget) -> None:
    """The results file, and the tables."""
    outcome = {"parts": budget.results, "left_out": budget.left_out, "seconds": budget.seconds}
    result = {"card": card, "smoke": options.smoke, "elapsed_s": budget.elapsed_s()} | outcome
    suffix = "-" + re.sub(r"[^A-Za-z0-9]+", "_", card["name"])
    path = harness.write_results(options.results, machine, result, suffix)
    table = to_markdown(machine, result)
    path.with_suffix(".md").write_text(table)
    print(table)


def is_installed(package: str) -> bool:
    """Whether a distribution is there."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def describe_card(device: str) -> Mapping[str, Any]:
    """The GPU, and what drives it."""
    import torch

    if device == "cpu":
        return {"name": "no GPU"}
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": torch.cuda.nccl.version(),  # type: ignore[no-untyped-call]
    }


if __name__ == "__main__":
    sys.exit(main())
