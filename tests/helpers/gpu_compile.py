"""The GPU's kernels compiled without a GPU, for the paper's sizes: what they take of a chip, the bytes they move."""

import dataclasses
import math
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.loader import triton_input
from pipeline.loader.input_rule import InputRule
from trainer.config import Config
from trainer.model.kernels.interface import Drop, Norm
from trainer.model.kernels.triton import LANES, WARPS, blocks_tile, drop_tile, norm_tile, pool_tile
from trainer.model.kernels.triton_blocks import from_blocks_kernel, to_blocks_kernel
from trainer.model.kernels.triton_dropout import relu_dropout_backward_kernel, relu_dropout_kernel
from trainer.model.kernels.triton_norm import norm_backward_kernel, norm_forward_kernel
from trainer.model.kernels.triton_pool import pool_backward_kernel, pool_forward_kernel
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
    """

    ptx: str
    registers: int | None
    spilled_bytes: int | None
    shared_bytes: int
    wide_loads: int
    wide_stores: int


def paper_kernels(dtype: str, batch: int) -> list[KernelCase]:
    """Every kernel of a step of the paper's net in one process, in ``bf16`` or ``fp32``."""
    model, cases = Config().model, []
    tensor = torch.bfloat16 if dtype == "bf16" else torch.float32
    size, pointer, sides = tensor.itemsize, f"*{dtype}", model.map_sizes()
    integers = dict.fromkeys(("rows", "pixels", "shape_h", "shape_w", "out_h", "out_w"), "i32")
    for number, layer in ((0, "conv1"), (1, "conv2"), (4, "conv5")):
        maps, side, out = model.channels[number], sides[layer], sides[f"pool{number + 1}"]
        x = torch.empty(batch, 2 * maps, side, side, dtype=tensor, device="meta")
        y = torch.empty(batch, 2 * maps, out, out, dtype=tensor, device="meta")
        bytes_x, bytes_y, bytes_place = size * x.numel(), size * y.numel(), y.numel()
        types = (
            dict.fromkeys(("x", "y", "g", "dx"), pointer) | {"place": "*u8", "alpha": "fp32", "k": "fp32"} | integers
        )
        pool = {"PX": model.pool_px, "STRIDE": model.pool_stride}
        vec, block, (forward,) = pool_tile(y)
        tile = {"CHANNELS": 2 * maps, **pool, "VEC": vec, "BLOCK": block}
        rectify = layer == "conv5"
        cases.append(KernelCase(
            f"pool forward {layer}", pool_forward_kernel, types, {**tile, "RECTIFY": rectify}, forward,
            bytes_x + bytes_y + bytes_place,
        ))  # fmt: skip
        if layer == "conv5":
            (backward,) = pool_tile(x)[2]
            cases.append(KernelCase(
                f"pool backward {layer}", pool_backward_kernel, types, tile, backward, bytes_x + bytes_y + bytes_place
            ))  # fmt: skip
            continue
        vec, pieces, lanes, (programs,) = norm_tile(x, Norm(x.numel() // maps, maps, 5, 1e-4, 2.0, True))
        tile = {"HALF": 2, "RECTIFY": True, "MAPS": maps, "VEC": vec, "W": pieces, "L": lanes}
        cases.append(KernelCase(f"norm forward {layer}", norm_forward_kernel, types, tile, programs, 2 * bytes_x))
        for name, pooled, moved in (
            ("norm backward", False, 3 * bytes_x),
            ("norm + pool backward", True, 2 * bytes_x + bytes_y + bytes_place),
        ):
            constants = {**tile, **pool, "TOWERS": 2, "POOLED": pooled}
            cases.append(KernelCase(f"{name} {layer}", norm_backward_kernel, types, constants, programs, moved))
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
    registers, spilled = _read_usage(made.asm["cubin"])
    wide = r"\.(v4\.(b32|f32|u32)|v2\.(b64|f64|u64))"
    return Compiled(
        ptx=ptx,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=made.metadata.shared,
        wide_loads=len(re.findall(rf"ld\.global\S*{wide}", ptx)),
        wide_stores=len(re.findall(rf"st\.global\S*{wide}", ptx)),
    )


def _read_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack and local memory of a thread, where Triton brings the tool that reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)
