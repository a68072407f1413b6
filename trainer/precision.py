"""Which number format a step multiplies in: ``train.precision = "auto"`` becomes the one that this machine is fast in.

bfloat16 pays where there are instructions for it: on a GPU from compute capability 8.0 on, on processors with
AVX512_BF16 or AMX_BF16 (x86), or BF16 (ARM). Elsewhere each product is emulated: on an EPYC without them a step of the
paper's net took 104 s, and 6.2 s in fp32.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from trainer.config import Config

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # of /proc/cpuinfo; the last is ARM's
BF16_CAPABILITY = 8  # of a GPU: A100 and later multiply bfloat16 at the full rate
FACTOR = 6.2 / 104  # of fp32's rate that bf16 had without instructions: the paper's net on an EPYC
# what oneDNN may be held to by its variables; without bfloat16 in its products
NARROWED = re.compile(r"SSE41|AVX|AVX2|AVX2_VNNI|AVX512_CORE|AVX512_CORE_VNNI", re.IGNORECASE)


def resolve_precision(config: "Config", device: str) -> "Config":
    """The recipe with a number format in place of ``auto``.

    Args:
        config: the recipe.
        device: ``cpu`` or ``cuda:N``.
    """
    if config.train.precision != "auto":
        return config
    precision: Literal["bf16", "fp32"] = "bf16" if is_fast_in_bf16(device) else "fp32"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def keep_precision(config: "Config", before: "Config") -> "Config":
    """The recipe with the number format of the run that it goes on with, where it says ``auto``: also elsewhere."""
    if config.train.precision != "auto":
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=before.train.precision))


def is_fast_in_bf16(device: str) -> bool:
    """Whether a device has instructions for products of bfloat16."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_capability(device)[0] >= BF16_CAPABILITY
    return has_bf16(processor_flags(), os.environ)


def has_bf16(flags: frozenset[str], environment: Mapping[str, str]) -> bool:
    """Whether a processor's flags name such instructions, and no variable keeps oneDNN from them."""
    held = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    return not flags.isdisjoint(BF16_FLAGS) and not NARROWED.fullmatch(held)


def processor_flags() -> frozenset[str]:
    """What ``/proc/cpuinfo`` says of the first processor; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def slow_warning(config: "Config", device: str) -> str:
    """What to say of a recipe that asks for bf16 where that is slow; empty where it does not."""
    if config.train.precision != "bf16" or is_fast_in_bf16(device):
        return ""
    name = "this GPU" if device.startswith("cuda") else "this processor"
    measured = "" if device.startswith("cuda") else f", expect about {FACTOR:.2f} times the rate of fp32"
    return (
        f"train.precision = 'bf16', and {name} has no instructions for it{measured}: 'auto' takes fp32 here (a "
        "run that has begun keeps what it has)"
    )


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 matrix products where the recipe asks for them."""
    if precision != "bf16":
        assert precision != "auto", "resolve_precision comes first"
        return contextlib.nullcontext()
    import torch

    return torch.autocast(device.split(":")[0], torch.bfloat16)


def image_dtype(precision: str, device: str) -> "torch.dtype":
    """The dtype of the images that a net is trained on: bfloat16 where a GPU's first layer would round them to it."""
    import torch

    return torch.bfloat16 if precision == "bf16" and device.startswith("cuda") else torch.float32


def allow_tf32(precision: str, device: str) -> None:
    """Lets fp32 matrix products of a GPU be tf32 where the recipe says so; cuDNN's convolutions are in any case."""
    if device.startswith("cuda"):
        import torch

        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
