"""The drawing of a recipe's net: what ``describe`` counts, in the form that ``drawing`` draws."""

from pathlib import Path

from pipeline.manifest import write_atomic
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.planning.describe import count_crossings, count_layers
from trainer.report.svg import Crossing, LayerRow, draw_towers

NOTES = {"norm": "LRN", "spatial_norm": "spatial norm", "batch_norm": "batch norm"}


def draw_net(model: ModelConfig) -> str:
    """The net of a recipe as an SVG document; bytes on the crossings are an image's, forward, float32."""
    image = f"{model.image_px}x{model.image_px}x{model.channels}"
    return draw_towers(layer_rows(model), crossings_of(model), image=image, towers=model.towers)


def write_drawing(path: Path, model: ModelConfig) -> None:
    """Writes :func:`draw_net` to a file.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        write_atomic(path, draw_net(model).encode())
    except OSError as error:
        raise ConfigError(
            f"--svg {path} cannot be written ({error.strerror}): give a file in a folder of yours"
        ) from None


def crossings_of(model: ModelConfig) -> list[Crossing]:
    """What crosses in the forward of one image, float32."""
    return [Crossing(row.layer, row.elements, row.bytes_a_to_b, row.bytes_b_to_a) for row in count_crossings(model)]


def layer_rows(model: ModelConfig) -> list[LayerRow]:
    """The layers of tower a, each pooling as a row of its own."""
    sizes, rows = model.map_sizes(), []
    for count in count_layers(model):
        name = count.layer
        if name.startswith("fc"):
            inputs, units = count.kernel.split(" -> ")
            dropout = ", dropout" if name != "fc8" and model.dropout else ""
            rows.append(LayerRow(name, f"{inputs} to {units}{dropout}", units, count.parameters_a))
            continue
        index = int(name[-1]) - 1
        maps, side, kernel = model.maps[index], sizes[name], model.kernels[index]
        stride = f", stride {model.strides[index]}" if model.strides[index] > 1 else ""
        then = [NOTES[word] for word in model.after[index].split() if word in NOTES]
        detail = ", ".join([f"{kernel}x{kernel}{stride}", f"{maps} maps", *then])
        rows.append(LayerRow(name, detail, f"{side}x{side}x{maps}", count.parameters_a))
        pooled = sizes.get(f"pool{index + 1}")
        if pooled:
            window = f"{model.pool_px}x{model.pool_px}, stride {model.pool_stride}"
            rows.append(LayerRow(f"pool{index + 1}", window, f"{pooled}x{pooled}x{maps}", 0))
    return rows
