"""The GPU's kernels compiled without a GPU, for the paper's sizes: what they take of a chip, the bytes they move."""

import dataclasses
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.loader import triton_input
from pipeline.loader.input_rule import InputRule
from tests.helpers.gpu_launches import recorded
from trainer.config import Config
from trainer.model.kernels.interface import Drop, GpuKernels, Norm, Pool, TowerMaps
from trainer.model.kernels.triton import LANES, WARPS, TritonKernels, blocks_tile, drop_tile
from trainer.model.kernels.triton_blocks import from_blocks_kernel, to_blocks_kernel
from trainer.model.kernels.triton_dropout import relu_dropout_backward_kernel, relu_dropout_kernel
from trainer.model.kernels.triton_update import BLOCK, update_all_kernel
from trainer.planning.describe import count_layers

ALIGNED = [["tt.divisibility", 16]]


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One kernel as the paper's net launches it.

    Attributes:
        name: what it does, and after which convolution.
        kernel: the function.
        types: of its arguments: ``*bf16``, ``i32``, ...
        constants: its constexpr arguments.
        programs: in a launch.
        moved_bytes: read and written, each byte once.
        warps: of a program.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    programs: int
    moved_bytes: int
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel as machine code.

    Attributes:
        ptx: its text before that.
        registers: of a thread; None without the tool that reads them.
        spilled_bytes: of a thread, in local memory; None likewise.
        shared_bytes: of a program.
        wide_loads: loads of 16 bytes.
        wide_stores: stores of 16 bytes.
        instructions: of a thread, those of a loop as often as it runs; None likewise.
    """

    ptx: str
    registers: int | None
    spilled_bytes: int | None
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    instructions: int | None


PARTS = {"conv1": (1, 2), "conv2": (2, 1), "conv3": (1, 2), "conv4": (2, 2), "conv5": (2, 1)}  # of what it makes; after


def paper_calls(functions: GpuKernels, dtype: str, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """Every kernel between the convolutions of the paper's net in one process, on made-up maps, by its name."""
    model, found = Config().model, {}
    tensor, sides = torch.bfloat16 if dtype == "bf16" else torch.float32, model.map_sizes()

    def noise(channels: int, side: int, parts: int) -> tuple[Tensor, ...]:
        shape = (batch, channels // parts, side, side)
        made = [torch.randn(shape, device=device, dtype=tensor).mul_(30) for _ in range(parts)]
        return tuple(each.contiguous(memory_format=torch.channels_last) for each in made)

    for number, (layer, (before, after)) in enumerate(PARTS.items()):
        channels, side = 2 * model.channels[number], sides[layer]
        out = sides.get(f"pool{number + 1}", side)
        maps = TowerMaps(noise(channels, side, before), torch.randn(channels, device=device))
        names, norm = model.post_ops[number], Norm(batch * side**2 * 2, channels // 2, 5, 1e-4, 2.0, True)
        if "maxpool" not in names:
            ys, slopes = noise(channels, side, after), noise(channels, side, after)
            found[f"relu forward {layer}"] = lambda m=maps, n=after: functions.relu_forward(m, n)
            found[f"relu backward {layer}"] = lambda m=maps.layout, y=ys, g=slopes: functions.relu_backward(y, g, m)
            continue
        pool = Pool(model.pool_px, model.pool_stride, model.pool_ceil, rectify="lrn" not in names)
        slopes, before_pool = noise(channels, out, after), maps
        if "lrn" in names:
            found[f"norm forward {layer}"] = lambda m=maps, n=norm: functions.norm_maps(m, n)
            before_pool = TowerMaps(noise(channels, side, 1))
        found[f"pool forward {layer}"] = lambda m=before_pool, p=pool, n=after: functions.pool_forward(m, p, n)
        places = functions.pool_forward(before_pool, pool, after)[1]
        if "lrn" in names:
            found[f"norm + pool backward {layer}"] = lambda m=maps, g=slopes, s=places, n=norm, p=pool: (
                functions.pooled_norm_backward(m, g, s, n, p)
            )
        else:
            found[f"pool backward {layer}"] = lambda m=maps.layout, g=slopes, s=places, p=pool: functions.pool_backward(
                g, s, m, p
            )
    return found


def paper_kernels(dtype: str, batch: int) -> list[KernelCase]:
    """Every kernel of a step of the paper's net in one process, in ``bf16`` or ``fp32``."""
    cases = []
    with recorded() as launches:
        for name, call in paper_calls(TritonKernels(), dtype, batch, "meta").items():
            launches.clear()
            call()
            (launch,) = launches
            cases.append(KernelCase(
                name, launch.kernel, launch.types, launch.constants, launch.programs, launch.moved_bytes
            ))  # fmt: skip
    return [*cases, blocks_case(dtype, batch), *_dropout_cases(dtype, batch), _update_case(dtype)]


def blocks_case(dtype: str, batch: int) -> KernelCase:
    """What cuts images into conv1's blocks of 4 x 4 px."""
    model, pointer = Config().model, f"*{dtype}"
    (before, _), stride, side = model.paddings[0], model.strides[0], model.image_px
    count = model.map_sizes()["conv1"] - 1 - (-model.kernel_sizes[0] // stride)
    tensor = torch.bfloat16 if dtype == "bf16" else torch.float32
    y = torch.empty(batch, stride**2 * model.in_channels, count, count, dtype=tensor, device="meta")
    vec, block, (rows, parts) = blocks_tile(y)
    constants = {"HEIGHT": side, "WIDTH": side, "CHANNELS": model.in_channels, "SIDE": stride, "BEFORE": before}
    constants |= {"ROWS": count, "COLUMNS": count, "VEC": vec, "BLOCK": block}
    moved = tensor.itemsize * (batch * model.in_channels * side**2 + y.numel())
    return KernelCase("blocks conv1", to_blocks_kernel, {"x": pointer, "y": pointer}, constants, rows * parts, moved)


def blocks_back_case(dtype: str) -> KernelCase:
    """What puts the gradient of conv1's weight, over blocks, together again."""
    model, pointer = Config().model, f"*{dtype}"
    kernel, stride, outputs = model.kernel_sizes[0], model.strides[0], 2 * model.channels[0]
    window, line = -(-kernel // stride), kernel * model.in_channels
    constants = {"HEIGHT": kernel, "WIDTH": kernel, "CHANNELS": model.in_channels, "SIDE": stride, "BEFORE": 0}
    constants |= {"ROWS": window, "COLUMNS": window, "BLOCK": WARPS * LANES}
    moved = 2 * (2 if dtype == "bf16" else 4) * outputs * kernel * line
    types = {"g": pointer, "dx": pointer}
    return KernelCase("blocks backward conv1", from_blocks_kernel, types, constants, outputs * kernel, moved)


def _dropout_cases(dtype: str, batch: int) -> list[KernelCase]:
    """ReLU and dropout of fc6, or of fc7."""
    units, pointer = Config().model.hidden[0], f"*{dtype}"
    tensor = torch.bfloat16 if dtype == "bf16" else torch.float32
    x = torch.empty(batch, 2 * units, dtype=tensor, device="meta")
    tile, (programs,) = drop_tile(x, Drop((0, 0), 0, units // 4, 0, 32768, 1.0))
    types = dict.fromkeys(("x", "y", "g", "dx"), pointer) | dict.fromkeys(("more_a", "more_b"), "*i64")
    types |= dict.fromkeys(("start_a", "start_b"), "i64") | {"factor": "fp32"}
    types |= dict.fromkeys(("count", "first", "least"), "i32")
    constants = dict(zip(("UNITS", "TOWERS", "WORDS", "SKIPPED", "VEC", "BLOCK"), tile, strict=True))
    back = {name: constants[name] for name in ("VEC", "BLOCK")}
    size = tensor.itemsize * x.numel()
    return [
        KernelCase("dropout forward fc6", relu_dropout_kernel, types, constants, programs, 2 * size),
        KernelCase("dropout backward fc6", relu_dropout_backward_kernel, types, back, programs, 3 * size),
    ]


def _update_case(dtype: str) -> KernelCase:
    """The update of all parameters of the paper's net."""
    parameters = sum(row.parameters_a + row.parameters_b for row in count_layers(Config().model))
    types = {"tensors": "*i64", "parts": "*i32", "factors": "*fp32", "guard": "*fp32"}
    constants = {"GUARDED": True, "ALIGNED": True, "BLOCK": BLOCK}
    moved = parameters * (22 if dtype == "bf16" else 20)
    return KernelCase("update", update_all_kernel, types, constants, math.ceil(parameters / BLOCK), moved)


def input_kernels(dtype: str, batch: int) -> list[KernelCase]:
    """What makes the input of the paper's net, in ``bf16`` or ``fp32``: its recipe, and its images standardized."""
    tensor = torch.bfloat16 if dtype == "bf16" else torch.float32
    side, stored, channels = Config().model.image_px, 256, Config().model.in_channels
    crops = torch.empty(batch, side, side, channels, dtype=torch.uint8, device="meta")
    image = torch.empty(stored, stored, channels, device="meta")
    rows = 4 * batch * (3 + 2 * channels)
    types = {"crops": "*u8", "rows": "*fp32", "image": "*fp32", "out": f"*{dtype}"}
    cases = []
    for name, standardize in (("net input", False), ("net input, standardized", True)):
        rule = InputRule(image, None, standardize, tensor)
        width, center = triton_input.place_of(rule, channels)
        block, warps, blocks = triton_input.tile(crops.shape, standardize=standardize)
        constants = {"SIDE": side, "C": channels, "WIDTH": width, "CENTER": center}
        constants |= {"STANDARDIZE": standardize, "BLOCK": block}
        moved = crops.numel() * (1 + tensor.itemsize) + 4 * image.numel() + rows
        cases.append(KernelCase(
            name, triton_input.net_input_kernel, types, constants, batch * blocks, moved, warps
        ))  # fmt: skip
    return cases


def compile_kernel(case: KernelCase, capability: int) -> Compiled:
    """Compiles for a GPU of ``capability`` (80: A100, 90: H100), all memory aligned as torch gives it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    attributes = {(place,): ALIGNED for place, name in enumerate(names) if signature[name].startswith("*")}
    constants = {name: case.constants[name] for name in names if name in case.constants}
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    code = _read_code(made.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", code)
    wide = r"\.(v4\.(b32|f32|u32)|v2\.(b64|f64|u64))"
    return Compiled(
        ptx=ptx,
        registers=int(usage[1]) if usage else None,
        spilled_bytes=int(usage[2]) + int(usage[3]) if usage else None,
        shared_bytes=made.metadata.shared,
        wide_loads=len(re.findall(rf"ld\.global\S*{wide}", ptx)),
        wide_stores=len(re.findall(rf"st\.global\S*{wide}", ptx)),
        instructions=count_instructions(code, case.constants.get("TILES", 1)) if code else None,
    )


def count_instructions(code: str, rounds: int) -> int:
    """Instructions that a thread of ``cuobjdump -sass`` is given, if its longest loop goes round so many times."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)
    place = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    backward = [
        number - place[int(to, 16)] + 1
        for number, (_, text) in enumerate(lines)
        for to in re.findall(r"BRA\b.*?0x([0-9a-f]+)", text)
        if place.get(int(to, 16), number) < number
    ]
    given = sum(not text.startswith("NOP") for _, text in lines)
    return given + (rounds - 1) * max(backward, default=0)


def _read_code(cubin: bytes) -> str:
    """What a thread takes (registers; bytes of stack and local memory), and its code; empty where Triton does not bring
    the tool that reads them.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
