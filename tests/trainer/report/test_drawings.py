"""The report's drawings: towers, charts, kernel sheets, confusion."""

import dataclasses
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.synthetic_run import ROOT, digits_config
from trainer.config import load_config
from trainer.errors import RecipeError
from trainer.planning.describe import CrossingCount
from trainer.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Line, line_chart
from trainer.report.confusion import confusion_svg
from trainer.report.figures import color_share, kernel_sheet
from trainer.report.net_drawing import LayerRow, draw_net, draw_towers, format_bytes, write_drawing
from trainer.report.run_data import interval

SVG = "{http://www.w3.org/2000/svg}"


def test_one_tower_is_drawn_alone() -> None:
    model = dataclasses.replace(digits_config().model, towers=1)
    text = "".join(ET.fromstring(draw_net(model)).itertext())
    assert "tower a" not in text and "conv1" in text


PAPER_ROWS = [
    LayerRow("conv2", "5x5, 128 maps", "27x27x128", 153_728),
    LayerRow("pool2", "3x3, stride 2", "13x13x128", 0),
    LayerRow("conv3", "3x3, 192 maps", "13x13x192", 442_560),
    LayerRow("fc8", "4096 to 1000", "1000", 4_097_000),
]


def test_width_of_a_crossing_is_in_proportion_to_its_bytes() -> None:
    crossings = [CrossingCount("conv3", 21_632, 86_528, 86_528), CrossingCount("fc8", 10_816, 0, 43_264)]
    drawn = ET.fromstring(draw_towers(PAPER_ROWS, crossings))
    widths = [
        float(path.get("stroke-width", "0")) for path in drawn.iter(f"{SVG}path") if path.get("class") == "ribbon"
    ]
    assert len(widths) == 3
    assert widths[0] == widths[1] == pytest.approx(2 * widths[2], rel=0.02)


def test_layer_that_only_a_has_is_drawn_once() -> None:
    drawn = ET.fromstring(draw_towers(PAPER_ROWS, [CrossingCount("fc8", 2048, 0, 8192)]))
    names = [text.text for text in drawn.iter(f"{SVG}text") if text.get("class") == "name"]
    assert names.count("conv3") == 2 and names.count("fc8") == 1


def test_drawing_refuses_a_crossing_into_nowhere() -> None:
    with pytest.raises(ValueError, match="fc9"):
        draw_towers(PAPER_ROWS, [CrossingCount("fc9", 1, 4, 4)])
    with pytest.raises(ValueError, match="no layers"):
        draw_towers([], [])


def test_drawing_of_the_paper_names_its_bytes() -> None:
    text = "".join(ET.fromstring(draw_net(load_config(ROOT / "configs" / "paper.toml").model)).itertext())
    for figure in ("86.5 kB", "18.4 kB", "8.19 kB", "21,632 values", "18,876,416", "13 × 13 × 128", "55 × 55 × 48"):
        assert figure in text


def test_image_of_the_readme_is_what_the_code_draws() -> None:
    drawn = draw_net(load_config(ROOT / "configs" / "paper.toml").model)
    how = "python -m trainer describe --config configs/paper.toml --svg docs/towers.svg"
    assert (ROOT / "docs" / "towers.svg").read_text() == drawn, f"make it again: {how}"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (86_528, "86.5 kB"), (999_600, "1.00 MB"), (243.9e6, "244 MB")],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


def labels_of(chart: str) -> list[tuple[float, float, str]]:
    """Texts of a chart with their places, (x, y, text)."""
    found = []
    for text in ET.fromstring(chart).iter(f"{SVG}text"):
        moved = re.match(r"translate\(([\d.]+) ([\d.]+)\)", text.get("transform", ""))
        x, y = moved.groups() if moved else (text.get("x", "nan"), text.get("y", "nan"))
        found.append((float(x), float(y), text.text or ""))
    return found


def ticks_of(chart: str) -> tuple[list[tuple[float, float]], list[float]]:
    """Tick labels of the values, (y, value), and places of those of the steps, x."""
    labels = labels_of(chart)
    values = [(y, float(text)) for x, y, text in labels if x < LEFT and text[-1].isdigit() and y > TOP - 1]
    return values, [x for x, y, text in labels if HEIGHT - BOTTOM < y < HEIGHT - 10 and text[0].isdigit() and x >= LEFT]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 440), (3.2, 3.4), (-5, 17), (0, 1e9), (97.1, 99.9)])
def test_ticks_are_inside_and_few(low: float, high: float) -> None:
    values, steps = ticks_of(line_chart([Line("x", [0, 880], [low, high])], Axis("x")))
    assert 2 <= len(values) <= 11 and 2 <= len(steps) <= 11
    half_a_line = 6
    assert all(TOP <= y - half_a_line / 2 <= HEIGHT - BOTTOM + half_a_line for y, _ in values)
    assert all(LEFT <= x <= WIDTH - RIGHT for x in steps)
    ticks = sorted(value for _, value in values)
    assert ticks[0] <= low + 1e-9 * abs(high) and ticks[-1] >= high * (1 - 1e-9)  # the axis ends on ticks


def test_log_ticks_are_inside() -> None:
    values, _ = ticks_of(line_chart([Line("x", [0, 1], [0.03 * 1.15, 2.4 / 1.1])], Axis("x", log=True)))
    assert sorted(value for _, value in values) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])


def test_chart_keeps_every_extreme_of_a_summarized_line() -> None:
    values = np.ones(10_000)
    values[7_777] = 50.0
    drawn = ET.fromstring(line_chart([Line("x", np.arange(10_000), values, summarize=True)], Axis("x", low=0)))
    (band,) = [group for group in drawn.iter(f"{SVG}g") if group.get("class") == "band"]
    outline, place = band.find(f".//{SVG}path"), band.find(f".//{SVG}use")
    assert outline is not None
    below = float(place.get("y", "0")) if place is not None else 0.0
    heights = [below + float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", outline.get("d", ""))]
    assert min(heights) == pytest.approx(TOP, abs=0.1)  # the top of the plot: the axis reaches the spike
    assert len(heights) < 400


def test_chart_takes_colors_and_font_from_the_page_and_is_the_same_again() -> None:
    lines = [Line("x", [0, 1, 2], [1, 3, 2]), Line("<b>", [0, 1, 2], [2, 1, 2], "a")]
    chart = line_chart(lines, Axis("x & y"))
    assert chart == line_chart(lines, Axis("x & y"))
    assert "var(--ink)" in chart and "var(--a)" in chart and "&lt;b&gt;" in chart
    for stranger in ("#1d1c1a", "font-family", "<style", "url(", "xlink", "<b>", 'id="axes'):
        assert stranger not in chart


@pytest.mark.parametrize("values", [[], [float("nan")], [None]])
def test_chart_without_numbers_is_empty(values: list) -> None:
    assert line_chart([Line("x", range(len(values)), values)], Axis("x")) == ""


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-8, 1.0], [0.0, 1.0], [float("inf"), 2.0]])
def test_chart_of_odd_values_is_drawn_without_nan(values: list[float]) -> None:
    drawn = line_chart([Line("x", range(len(values)), values)], Axis("x", log=True))
    assert drawn and "nan" not in drawn and "inf" not in drawn


def test_kernel_sheet_shows_each_kernel_on_its_own_scale() -> None:
    weight = np.zeros((10, 3, 5, 5), np.float32)
    weight[0, 0, 0, 0] = 1e-3
    weight[9, :, 4, 4] = -7.0
    sheet = kernel_sheet(weight, columns=8, kernel_px=10)
    assert sheet.shape == (2 * 10 + 2, 8 * 12 - 2, 4)
    assert sheet[0, 0].tolist() == [255, 128, 128, 255]
    assert sheet[12 + 9, 12 + 9].tolist() == [0, 0, 0, 255]
    assert sheet[12, 40, 3] == 0  # no kernel there


def test_color_share_tells_gray_from_color() -> None:
    gray = np.repeat(np.random.default_rng(0).normal(size=(4, 1, 3, 3)), 3, axis=1).astype(np.float32)
    opponent = gray * np.array([1, -1, 0], np.float32).reshape(1, 3, 1, 1)
    assert color_share(gray) == pytest.approx(0, abs=1e-6)
    assert color_share(opponent) == pytest.approx(1)


def test_confusion_counts_are_all_shown() -> None:
    counts = np.array([[5, 2], [0, 3]])
    drawn = ET.fromstring(confusion_svg(counts, ["apple", "pear"]))
    shown = [group.find(f"{SVG}text") for group in drawn.iter(f"{SVG}g") if group.get("class") == "count"]
    assert [text.text for text in shown if text is not None] == ["5", "2", "3"]


def test_wrong_cells_have_another_color_than_right_ones() -> None:
    """The one mistake beside 999 right ones is as visible as a mistake can be."""
    drawn = confusion_svg(np.array([[999, 1], [0, 1000]]), ["0", "1"])
    tints = re.findall(r"fill: var\(--(a|wrong)\); (?:fill-)?opacity: ([\d.]+)", drawn)
    assert [color for color, _ in tints] == ["a", "wrong", "a"]
    assert [float(tint) for _, tint in tints] == pytest.approx([0.08 + 0.42 * 0.999, 0.6, 0.5], abs=1e-3)


def test_interval_is_wilsons() -> None:
    assert interval(352, 360) == "95.7 to 98.9 %"  # p = 0.97778, n = 360: 0.95675, 0.98869
    assert interval(10, 10) == "72.2 to 100.0 %"


def test_drawing_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="cannot be written"):
        write_drawing(tmp_path / "file" / "net.svg", digits_config().model)
