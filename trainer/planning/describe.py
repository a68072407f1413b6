"""The net in numbers, counted from the recipe alone: layers, parameters, operations, what crosses; and as tables."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.config import LAYERS, ModelConfig

BYTES = 4  # a float32


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """One layer of the net.

    Attributes:
        layer: conv1 ... fc8.
        kernel: what it computes, for people.
        output: maps per tower and their side, or units per tower.
        parameters_a: parameters on tower a.
        parameters_b: parameters on tower b.
        multiply_accumulates: an image, both towers.
    """

    layer: str
    kernel: str
    output: str
    parameters_a: int
    parameters_b: int
    multiply_accumulates: int


@dataclasses.dataclass(frozen=True)
class CrossingCount:
    """One crossing, forward, an image, in float32; backward moves the same again in the opposite direction.

    Attributes:
        layer: the layer whose input crosses.
        elements: elements each way.
        bytes_a_to_b: bytes from tower a to tower b.
        bytes_b_to_a: bytes from tower b to tower a.
    """

    layer: str
    elements: int
    bytes_a_to_b: int
    bytes_b_to_a: int


def count_layers(config: ModelConfig) -> list[LayerCount]:
    """Counts every layer (section 3.5 and figure 2 of the paper)."""
    sizes, towers = config.map_sizes(), config.towers
    rows = []
    inputs = config.in_channels
    for index, layer in enumerate(LAYERS[:5]):
        inputs *= towers if layer in config.crossings else 1
        maps, kernel, side = config.channels[index], config.kernel_sizes[index], sizes[layer]
        weights = kernel * kernel * inputs * maps
        stride = f", stride {config.strides[index]}" if config.strides[index] > 1 else ""
        pooled = sizes.get(f"pool{index + 1}")
        output = f"{maps} x {side} x {side}" + (f", pooled {pooled} x {pooled}" if pooled else "")
        parameters = weights + maps * (3 if "batch_norm" in config.post_ops[index] else 1)  # scale, shift
        rows.append(
            LayerCount(
                layer=layer,
                kernel=f"{kernel}x{kernel}x{inputs}{stride}",
                output=output,
                parameters_a=parameters,
                parameters_b=parameters * (towers - 1),
                multiply_accumulates=weights * side * side * towers,
            )
        )
        inputs = maps
    inputs *= config.final_side**2
    for layer in LAYERS[5:]:
        inputs *= towers if layer in config.crossings else 1
        last = layer == "fc8"
        units = {"fc6": config.hidden[0], "fc7": config.hidden[1], "fc8": config.classes}[layer]
        parameters = inputs * units + units
        rows.append(
            LayerCount(
                layer=layer,
                kernel=f"{inputs} -> {units}",
                output=f"{units}" + (" on tower a" if last and towers == 2 else ""),
                parameters_a=parameters,
                parameters_b=0 if last else parameters * (towers - 1),
                multiply_accumulates=inputs * units * (1 if last else towers),
            )
        )
        inputs = units
    return rows


def count_crossings(config: ModelConfig) -> list[CrossingCount]:
    """Counts what crosses in the forward of one image."""
    if config.towers == 1:
        return []
    pooled = list(config.map_sizes().values())
    side2 = config.map_sizes().get("pool2", config.map_sizes()["conv2"])
    elements = {
        "conv3": config.channels[1] * side2**2,
        "fc6": config.channels[4] * pooled[-1] ** 2,
        "fc7": config.hidden[0],
        "fc8": config.hidden[1],
    }
    return [
        CrossingCount(layer, elements[layer], 0 if layer == "fc8" else elements[layer] * BYTES, elements[layer] * BYTES)
        for layer in ("conv3", "fc6", "fc7", "fc8")
        if layer in config.crossings
    ]


def count_neurons(config: ModelConfig) -> int:
    """Units of the net: every convolution's maps and every fully connected unit."""
    sizes, towers = config.map_sizes(), config.towers
    maps = sum(config.channels[i] * sizes[f"conv{i + 1}"] ** 2 for i in range(5)) * towers
    return maps + sum(config.hidden) * towers + config.classes


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """Everything :func:`print_tables` shows, for machines."""
    layers, crossings = count_layers(config), count_crossings(config)
    return {
        "layers": [dataclasses.asdict(row) for row in layers],
        "crossings": [dataclasses.asdict(row) for row in crossings],
        "parameters_a": sum(row.parameters_a for row in layers),
        "parameters_b": sum(row.parameters_b for row in layers),
        "parameters": sum(row.parameters_a + row.parameters_b for row in layers),
        "multiply_accumulates": sum(row.multiply_accumulates for row in layers),
        "neurons": count_neurons(config),
        "crossing_bytes_a_to_b": sum(row.bytes_a_to_b for row in crossings),
        "crossing_bytes_b_to_a": sum(row.bytes_b_to_a for row in crossings),
    }


def print_tables(config: ModelConfig) -> None:
    """Prints the layer table and the crossings."""
    facts = to_dict(config)
    console = Console(width=None if Console().is_terminal else 110)
    table = Table(title="layers, a tower", title_justify="left", show_footer=True)
    table.add_column("layer", footer="total")
    table.add_column("kernel")
    table.add_column("output")
    table.add_column("parameters, tower a", justify="right", footer=f"{facts['parameters_a']:,}")
    table.add_column("tower b", justify="right", footer=f"{facts['parameters_b']:,}")
    table.add_column("both", justify="right", footer=f"{facts['parameters']:,}")
    table.add_column("MACs per image, both", justify="right", footer=f"{facts['multiply_accumulates']:,}")
    for row in count_layers(config):
        both = row.parameters_a + row.parameters_b
        numbers = (row.parameters_a, row.parameters_b, both, row.multiply_accumulates)
        table.add_row(row.layer, row.kernel, row.output, *(f"{number:,}" for number in numbers))
    console.print(table)
    if not facts["crossings"]:
        console.print("One tower: nothing crosses.")
        return
    table = Table(
        title="crossings, forward, float32, an image; backward the same again", title_justify="left", show_footer=True
    )
    table.add_column("input of", footer="total")
    table.add_column("elements each way", justify="right")
    table.add_column("bytes a -> b", justify="right", footer=f"{facts['crossing_bytes_a_to_b']:,}")
    table.add_column("bytes b -> a", justify="right", footer=f"{facts['crossing_bytes_b_to_a']:,}")
    for crossing in count_crossings(config):
        cells = (crossing.elements, crossing.bytes_a_to_b, crossing.bytes_b_to_a)
        table.add_row(crossing.layer, *(f"{number:,}" for number in cells))
    console.print(table)
