"""The kernel of the net's input against its definition in float64, on any device: by Triton's interpreter on a CPU."""

import torch

from pipeline.loader.input_rule import InputRule, by_torch

ROUNDING = 2.0**-24  # half a step of float32 at 1
ROUNDINGS = 8  # at most, in any order of the same operations, each of values within 255 + 255 + the color noise


def rounding_bound(largest: float, factor: float) -> float:
    """What float32 may be off by, in the recipe's unit: ``largest`` gray levels on the way, times ``factor``."""
    return ROUNDINGS * ROUNDING * largest * factor


def make_rows(count: int, span: tuple[int, int], channels: int) -> torch.Tensor:
    """(N, 3 + 2 C): the first and the last place of a crop and others, mirrored in turns; noise, factors near 1."""
    x, y = (torch.randint(side + 1, (count,)) for side in span)
    x[0], y[0], x[-1], y[-1] = 0, 0, *span
    geometry = torch.stack([x, y, torch.arange(count) % 2], 1)
    subtracted, factor = 120 + 20 * torch.randn(count, channels), 0.5 + torch.rand(count, channels)
    return torch.cat([geometry, subtracted, factor], 1).float()


def check_net_input(device: str) -> None:
    """Odd sizes, gray and color, all kinds of mean images, float32 and bfloat16, standardized and not."""
    from pipeline.loader.triton_input import net_input

    cases = [  # side, channels, height and width of the mean image, its kind, standardized, dtype
        (13, 3, (17, 15), "aligned", False, torch.float32),
        (16, 3, (16, 19), "center", False, torch.bfloat16),
        (24, 1, (25, 30), "aligned", False, torch.bfloat16),
        (7, 3, (7, 7), "none", False, torch.float32),
        (11, 1, (12, 13), "center", True, torch.float32),
        (40, 3, (41, 44), "aligned", True, torch.bfloat16),
    ]
    if device != "cpu":  # the paper's size; Triton's interpreter takes its time
        cases += [
            (224, 3, (256, 256), kind, standardize, dtype)
            for kind in ("aligned", "center", "none")
            for standardize in (False, True)
            for dtype in (torch.float32, torch.bfloat16)
        ]
    for side, channels, (height, width), kind, standardize, dtype in cases:
        crops = torch.randint(256, (3, side, side, channels), dtype=torch.uint8).to(device)
        image = None if kind == "none" else (255 * torch.rand(height, width, channels)).to(device)
        center = ((width - side) // 2, (height - side) // 2) if kind == "center" else None
        rows = make_rows(3, (width - side, height - side), channels).to(device)
        found = net_input(crops, rows, InputRule(image, center, standardize, dtype))
        exact = by_torch(crops, rows.double(), InputRule(image, center, standardize, torch.float64))
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        step = 2**-7 if dtype == torch.bfloat16 else ROUNDINGS * ROUNDING  # the interpreter cuts off what a GPU rounds
        unit = 4 / 20 if standardize else 1.0  # divided by a deviation of 20 or more, 2 roundings of it and of the mean
        torch.testing.assert_close(found.double(), exact, rtol=step, atol=unit * rounding_bound(255 + 255 + 200, 1.5))


def check_flat_images(device: str) -> None:
    """An image of one color, standardized, is 0 and finite, whatever its color."""
    from pipeline.loader.triton_input import net_input

    side = 224 if device != "cpu" else 40
    crops = torch.tensor([0, 1, 200, 255], dtype=torch.uint8, device=device)[:, None, None, None]
    crops = crops.expand(4, side, side, 3).contiguous()
    rows = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1, 1]], device=device).float().repeat(4, 1)
    assert float(net_input(crops, rows, InputRule(None, None, True, torch.float32)).abs().max()) < 0.01
