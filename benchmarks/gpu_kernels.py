"""The GPU's kernels against the bytes they must move, for the paper's net in one process, and all that a step moves.

Without a GPU: what each kernel moves by count, its time at ``--rate`` GB/s, and what it takes of a chip once it is
compiled for it (registers, spills, shared memory, 16-byte loads and stores, shuffles, instructions: a kernel that has
more of them than an H100 issues while its bytes move is not at its floor). With a GPU: what it takes there,
too, beside a copy of memory on the same card in the same run.

A second table counts what forward and backward of a step in bfloat16 move outside of the matrix products: each kernel,
and each operation of torch that is left.

With ``--cpu``: whether conv1 over blocks of 4 x 4 px (trainer/model/gpu_layers.py) pays on this processor, forward and
backward, in turns with the plain convolution.

    python benchmarks/gpu_kernels.py [--batch 1024] [--dtype bf16] [--capability 90] [--rate 2870] [--cpu]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

from tests.helpers.gpu_compile import KernelCase, compile_kernel, paper_calls, paper_kernels
from tests.helpers.gpu_passes import count_step
from trainer.config import TOWERS, Config
from trainer.model.gpu_layers import join
from trainer.model.kernels.interface import Blocks, Member
from trainer.model.kernels.triton import TritonKernels
from trainer.model.layers import Conv2d, Dropout, DropoutDraws
from trainer.parallel.crossing import make_net
from trainer.precision import autocast

H100_GB_PER_S = 2870  # read and written, as measured on an H100; --rate for another card
H100_ISSUES_PER_S = 132 * 4 * 1.7e9  # instructions of a warp: processors, a cycle, Hz; no kernel reaches all of them
COPY_BYTES = 1 << 30


def main() -> None:
    """Prints a table and writes the results file."""
    parser = harness.make_parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=1024, metavar="N", help="images (1024)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU to compile for (90: H100; 80: A100)")
    parser.add_argument("--rate", type=float, default=H100_GB_PER_S, metavar="GB/S", help=f"({H100_GB_PER_S})")
    parser.add_argument("--cpu", action="store_true", help="measure conv1 over blocks on this processor instead")
    options = parser.parse_args()
    machine = harness.describe_machine("torch", "triton")
    if options.cpu:
        harness.write_results(options.results, machine, measure_conv1(options), f"-conv1-{options.dtype}")
        return
    rate, result = options.rate, {"batch": options.batch, "dtype": options.dtype, "capability": options.capability}
    launches: dict[str, Callable[[], Any]] = {}
    if torch.cuda.is_available():
        launches = make_launches(options.batch, options.dtype)
        rate = measure_copy()
        machine |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    rows = [describe(case, options.capability, rate) for case in paper_kernels(options.dtype, options.batch)]
    for row in rows:
        if row["kernel"] in launches:
            row["ms"] = time_ms(launches[row["kernel"]], options.rounds)
            row["times_floor"] = row["ms"] / row["floor_ms"]
    print_table(rows, rate)
    step = count_passes(options.batch)
    print_passes(step, rate)
    harness.write_results(options.results, machine, result | {"gb_per_s": rate, "kernels": rows, "step": step})


def describe(case: KernelCase, capability: int, rate: float) -> dict[str, Any]:
    """A row of the table: what is known of a kernel before it runs."""
    made = compile_kernel(case, capability)
    issued = case.programs * case.warps * made.instructions if made.instructions else None
    return {
        "kernel": case.name,
        "programs": case.programs,
        "moved_mb": case.moved_bytes / 1e6,
        "floor_ms": case.moved_bytes / rate / 1e6,
        "instructions": made.instructions,
        "issue_ms": issued and issued / H100_ISSUES_PER_S * 1e3,
        "registers": made.registers,
        "spilled_bytes": made.spilled_bytes,
        "shared_bytes": made.shared_bytes,
        "wide_loads": made.wide_loads,
        "wide_stores": made.wide_stores,
        "shuffles": made.ptx.count("shfl.sync"),
    }


def print_table(rows: list[dict[str, Any]], rate: float) -> None:
    """As Markdown."""
    measured = any("ms" in row for row in rows)
    columns = f"MB moved | ms at {rate:,.0f} GB/s | ms to issue, H100 | registers | spilled bytes | shared bytes"
    columns += " | 16-byte loads, stores"
    print(f"| kernel | {columns} |" + (" measured ms | times the floor |" if measured else ""))
    print("|---|---:|---:|---:|---:|---:|---:|---:|" + ("---:|---:|" if measured else ""))
    for row in rows:
        issue = "" if row["issue_ms"] is None else f"{row['issue_ms']:.3f}"
        print(
            f"| {row['kernel']} | {row['moved_mb']:,.0f} | {row['floor_ms']:.3f} | {issue} | {row['registers']} | "
            f"{row['spilled_bytes']} | {row['shared_bytes']} | {row['wide_loads']}, {row['wide_stores']} |"
            + (f" {row.get('ms', float('nan')):.3f} | {row.get('times_floor', float('nan')):.2f} |" if measured else "")
        )


def count_passes(batch: int) -> list[dict[str, Any]]:
    """What forward and backward of a step move outside of the matrix products, by operation, most first."""
    rows: dict[str, dict[str, Any]] = {}
    for moved in count_step(Config().model, batch):
        if not moved.is_product:
            row = rows.setdefault(moved.name, {"operation": moved.name, "calls": 0, "moved_mb": 0.0})
            row["calls"] += 1
            row["moved_mb"] += moved.moved_bytes / 1e6
    return sorted(rows.values(), key=lambda row: -row["moved_mb"])


def print_passes(rows: list[dict[str, Any]], rate: float) -> None:
    """As Markdown; what moves less than a megabyte stands in the sum only."""
    print(f"\n| a step, but for products and update | calls | MB moved | ms at {rate:,.0f} GB/s |")
    print("|---|---:|---:|---:|")
    calls, moved = (sum(row[name] for row in rows) for name in ("calls", "moved_mb"))
    large = [row for row in rows if row["moved_mb"] >= 1]
    for row in (*large, {"operation": "all", "calls": calls, "moved_mb": moved}):
        ms = row["moved_mb"] / rate
        print(f"| {row['operation']} | {row['calls']} | {row['moved_mb']:,.0f} | {ms:.3f} |")


def make_launches(batch: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """Every kernel by its name, on made-up maps on the GPU."""
    functions, tensor = TritonKernels(), torch.bfloat16 if dtype == "bf16" else torch.float32
    found = paper_calls(functions, dtype, batch, "cuda") | input_launches(batch, tensor, functions)
    update = functions.make_update(torch.device("cuda"))
    members = [
        Member(w, torch.zeros_like(w), torch.zeros_like(w), w.bfloat16() if dtype == "bf16" else None, (0.9, 0.0, 0.0))
        for w in (parameter.detach() for parameter in make_net(Config(), None, device="cuda").parameters())
    ]
    update.send(members)
    return found | {"update": lambda: update(members, None)}


def input_launches(batch: int, dtype: torch.dtype, functions: TritonKernels) -> dict[str, Callable[[], Any]]:
    """What cuts images for conv1, and ReLU with dropout behind fc6."""
    model = Config().model
    images = torch.randn(batch, model.in_channels, model.image_px, model.image_px, device="cuda", dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    count = model.map_sizes()["conv1"] - 1 - (-model.kernel_sizes[0] // model.strides[0])
    blocks = Blocks(model.strides[0], model.paddings[0][0], count, count)
    x = torch.randn(batch, 2 * model.hidden[0], device="cuda", dtype=dtype)
    drop = Dropout(model, "fc6", TOWERS, "relu").drop(x, DropoutDraws(0, 0))
    y = functions.drop_forward(x, drop)
    return {
        "blocks conv1": lambda: functions.to_blocks(images, blocks),
        "dropout forward fc6": lambda: functions.drop_forward(x, drop),
        "dropout backward fc6": lambda: functions.drop_backward(x, y, drop),
    }


def measure_copy() -> float:
    """Memory read and written, GB/s."""
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / time_ms(lambda: target.copy_(source), 5) / 1e6


def time_ms(launch: Callable[[], Any], rounds: int, repeats: int = 20) -> float:
    """Median over rounds of a launch's time on the GPU, ms; the cache holds little of what a launch reads."""
    launch()
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            launch()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / repeats)
    return statistics.median(found)


def measure_conv1(options: argparse.Namespace) -> dict[str, Any]:
    """Both ways to compute conv1 in turns, forward and backward: seconds of one thread's processor, ratios in rounds.

    Processor time, not wall time: other work on the machine then changes little.
    """
    torch.set_num_threads(1)
    batch = min(options.batch, 32)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    module = Conv2d(3, 96, 11, 4, (0, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.01)

    def timed(compute: Callable[[Tensor], Tensor]) -> float:
        begin = time.process_time()
        with autocast(options.dtype, "cpu"):
            y = compute(x)
        y.backward(torch.ones_like(y))
        return time.process_time() - begin

    cases = {"plain": lambda: timed(module), "blocks": lambda: timed(lambda x: join(module.rearranged(x)))}
    found = harness.take_turns(cases, options.rounds, warm_up=1, show=lambda s: f"{s:.3f} s")
    ratio = harness.ratio(found["plain"], found["blocks"])
    print(f"conv1 over blocks: {ratio['median']:.2f} times the plain rate ({ratio['min']:.2f} to {ratio['max']:.2f})")
    seconds = {name: harness.spread(values) for name, values in found.items()}
    return {"batch": batch, "dtype": options.dtype, "seconds": seconds, "plain over blocks": ratio}


if __name__ == "__main__":
    main()
