"""The report of a synthetic run folder: written by the trainer's own writers, with plausible numbers."""

import dataclasses
import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from trainer import checkpoint
from trainer.config import Config, load_config, to_toml
from trainer.describe import count_crossings, count_layers
from trainer.drawing import Crossing, LayerRow, draw_towers, format_bytes
from trainer.errors import ConfigError, RunError, TrainerError
from trainer.metrics import MetricsLog
from trainer.model import TwoTowerNet
from trainer.net_drawing import draw_net, write_drawing
from trainer.optimizer import PaperSGD
from trainer.report import Report, render_report, write_report
from trainer.report_charts import Axis, Line, confusion_chart, line_chart, log_ticks, nice_ticks
from trainer.report_figures import interval
from trainer.report_pictures import PictureRow, PictureSet, colour_share, kernel_sheet
from trainer.report_run import read_run
from trainer.run import Result, write_result

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def digits_config() -> Config:
    return load_config(ROOT / "configs" / "digits.toml")


def step_row(step: int, generator: np.random.Generator) -> dict:
    return {
        "kind": "step",
        "step": step,
        "epoch": (step - 1) // 22,
        "loss": 2.3 * float(np.exp(-step / 90) + 0.01) * float(generator.uniform(0.7, 1.4)),
        "learning_rate": 0.02 if step <= 308 else 0.004,
        "images_per_s": float(generator.normal(900, 40)),
        "data_wait_share": float(generator.uniform(0.005, 0.03)),
        "gradient_norm": {"a": float(generator.uniform(0.5, 2)), "b": float(generator.uniform(0.3, 1.5))},
    }


def ledger_of(config: Config) -> list[dict]:
    batch, rows = config.train.batch_size, []
    for crossing in count_crossings(config.model):
        for phase, forwards in (("forward", True), ("backward", False)):
            for way, count in (("a->b", crossing.bytes_a_to_b), ("b->a", crossing.bytes_b_to_a)):
                if count:
                    direction = way if forwards else way[3] + "->" + way[0]
                    row = {"kind": "crossing", "name": crossing.layer, "phase": phase, "direction": direction}
                    rows.append(row | {"calls": 1, "bytes": count * batch})
    control = {"kind": "control", "name": "flags and fingerprint", "phase": "step", "calls": 1, "bytes": 24}
    return [*rows, control | {"direction": "a->b"}, control | {"direction": "b->a"}]


def make_run(folder: Path, config: Config, *, steps: int = 440, ended: bool = True) -> Path:
    """A run folder as a run of two processes leaves it; with ``ended`` false, as one leaves it that was killed."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config))
    environment = {"command": "python -m trainer train", "commit": "0123456789ab", "processor": "A CPU", "cores": 2}
    (folder / "environment.json").write_text(json.dumps(environment | {"torch": "2.15.0", "gpus": []}))
    generator = np.random.default_rng(0)
    log = MetricsLog(folder, 0)
    for step in range(1, steps + 1):
        log.write(step_row(step, generator))
        if step % 44 == 0:
            top1 = 1 - float(np.exp(-step / 100)) - 0.02
            row = {"kind": "evaluation", "step": step, "epoch": step / 22, "split": "val", "views": "centre"}
            log.write(row | {"top1": top1, "top5": 0.995, "loss": 0.1 + 2 * (1 - top1), "num_samples": 360})
    log.close()
    if not ended:
        return folder
    net = TwoTowerNet(config.model, seed=1)
    checkpoint.save_towers(
        checkpoint.unfinished(folder, steps), net, PaperSGD(net.named_parameters(), config.optimizer)
    )
    checkpoint.commit(folder, steps, config=config.fingerprint, loader={}, towers=("a", "b"))
    ending = Result(
        exit_reason="finished",
        reason="",
        step=steps,
        epoch=steps / 22,
        top1=352 / 360,
        top5=359 / 360,
        num_samples=360,
        elapsed_s=93.0,
        images_per_s=897.4,
        processes=2,
        batch_size=config.train.batch_size,
        ledger=ledger_of(config),
    )
    write_result(folder, ending)
    return folder


def some_pictures() -> PictureSet:
    generator = np.random.default_rng(3)
    images = generator.integers(0, 255, (6, 28, 28, 1), dtype=np.uint8)
    first = [PictureRow(image, str(i), str(i), 0.99) for i, image in enumerate(images[:5])]
    wrong = PictureRow(images[5], "3", "8", 0.731)
    confusion = np.diag(np.full(10, 36))
    confusion[3, 8], confusion[3, 3] = 1, 35
    names = [str(i) for i in range(10)]
    return PictureSet([*first, wrong], [wrong], num_wrong=1, num_samples=360, confusion=confusion, classes=names)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "a-run", digits_config())


class Collector(html.parser.HTMLParser):
    """Tags left open, addresses asked for, and text shown."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            value or "" for name, value in attributes if name == "src" or (tag == "link" and name == "href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def parse(page: str) -> Collector:
    collector = Collector()
    collector.feed(page)
    collector.close()
    assert collector.open == []
    return collector


def test_report_asks_for_nothing_outside_itself(run: Path) -> None:
    page = render_report(Report(read_run(run), some_pictures()))
    assert all(address.startswith("data:") for address in parse(page).addresses)
    assert not re.search(r"url\(|@import|<script|<iframe", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_report_says_the_result_of_the_run(run: Path) -> None:
    text = parse(render_report(Report(read_run(run), some_pictures()))).text
    for figure in ("97.78 %", "352 of 360 pictures", "99.72 %", "897", "440", "0123456789ab", "A CPU, 2 cores"):
        assert figure in text
    assert "taken for 8" in text and "73.1 %" in text
    assert "359 right, 1 wrong" in text


def test_ledger_totals_are_the_sum_of_the_rows(run: Path) -> None:
    record = read_run(run)
    text = parse(render_report(Report(record))).text
    crossed = sum(row["bytes"] for row in record.result["ledger"] if row["kind"] == "crossing")
    config = digits_config()
    assert crossed == 2 * config.train.batch_size * sum(
        c.bytes_a_to_b + c.bytes_b_to_a for c in count_crossings(config.model)
    )
    assert f"all crossing{crossed:,}" in text.replace("\n", "") and f"{format_bytes(crossed)} between" in text
    both = sum(row.parameters_a + row.parameters_b for row in count_layers(config.model))
    assert f"{both:,} parameters" in text


def test_every_link_leads_to_a_file_of_the_run(run: Path) -> None:
    page = write_report(run).read_text()
    paths = re.findall(r'<a href="([^"]+)"', page)
    assert {"config.toml", "environment.json", "metrics.jsonl", "result.json", "checkpoints"} <= set(paths)
    assert all((run / path).exists() for path in paths)


def test_report_is_the_same_bytes_again(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_killed_run_without_checkpoint_or_result_is_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", digits_config(), steps=30, ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 31, "lo')
    text = parse(write_report(folder).read_text()).text
    for sentence in (
        "has not ended",
        "no checkpoint yet",
        "not been evaluated yet",
        "No ledger yet",
        "no data set was given",
    ):
        assert sentence in text
    assert "30" in text


def test_run_that_only_just_began_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    text = parse(write_report(tmp_path).read_text()).text
    assert "No step has finished yet" in text and "has no config.toml" in text


def test_missing_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder at"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(TrainerError, match=r"result\.json is damaged"):
        write_report(tmp_path)


def test_names_from_outside_are_escaped(run: Path) -> None:
    evil = "<script>alert(1)</script>"
    row = PictureRow(np.zeros((8, 8, 3), np.uint8), evil, evil, 0.5)
    page = render_report(Report(read_run(run), PictureSet([row], [], 0, 1, np.eye(2, dtype=np.int64), [evil, '"x"'])))
    assert "<script" not in page
    parse(page)


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
    crossings = [Crossing("conv3", 21_632, 86_528, 86_528), Crossing("fc8", 10_816, 0, 43_264)]
    drawn = ET.fromstring(draw_towers(PAPER_ROWS, crossings))
    widths = [
        float(path.get("stroke-width", "0")) for path in drawn.iter(f"{SVG}path") if path.get("class") == "ribbon"
    ]
    assert len(widths) == 3
    assert widths[0] == widths[1] == pytest.approx(2 * widths[2], rel=0.02)


def test_layer_that_only_a_has_is_drawn_once() -> None:
    drawn = ET.fromstring(draw_towers(PAPER_ROWS, [Crossing("fc8", 2048, 0, 8192)]))
    names = [text.text for text in drawn.iter(f"{SVG}text") if text.get("class") == "name"]
    assert names.count("conv3") == 2 and names.count("fc8") == 1


def test_drawing_refuses_a_crossing_into_nowhere() -> None:
    with pytest.raises(ValueError, match="fc9"):
        draw_towers(PAPER_ROWS, [Crossing("fc9", 1, 4, 4)])
    with pytest.raises(ValueError, match="no layers"):
        draw_towers([], [])


def test_drawing_of_the_paper_names_its_bytes() -> None:
    text = "".join(ET.fromstring(draw_net(load_config(ROOT / "configs" / "paper.toml").model)).itertext())
    for figure in ("86.5 kB", "18.4 kB", "8.19 kB", "21,632 values", "18,876,416", "13 × 13 × 128", "55 × 55 × 48"):
        assert figure in text


def test_picture_of_the_readme_is_what_the_code_draws() -> None:
    drawn = draw_net(load_config(ROOT / "configs" / "paper.toml").model)
    how = "python -m trainer describe --config configs/paper.toml --svg docs/towers.svg"
    assert (ROOT / "docs" / "towers.svg").read_text() == drawn, f"make it again: {how}"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (86_528, "86.5 kB"), (999_600, "1.00 MB"), (243.9e6, "244 MB")],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 440), (3.2, 3.4), (-5, 17), (0, 1e9), (97.1, 99.9)])
def test_ticks_are_inside_and_few(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 11
    assert low - 1e-9 * abs(high) <= ticks[0] < ticks[-1] <= high * (1 + 1e-9)


def test_log_ticks_are_inside() -> None:
    assert log_ticks(0.03, 2.4) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])


def test_chart_keeps_every_extreme_of_a_summarised_line() -> None:
    values = np.ones(10_000)
    values[7_777] = 50.0
    drawn = ET.fromstring(line_chart([Line("x", np.arange(10_000), values, summarise=True)], Axis("x", low=0)))
    band = next(path.get("d", "") for path in drawn.iter("path") if path.get("class") == "band")
    heights = [float(pair.split()[1]) for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", band)]
    assert min(heights) == pytest.approx(34, abs=0.1)  # the top of the plot: the axis reaches the spike
    assert len(heights) < 400


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


def test_colour_share_tells_gray_from_colour() -> None:
    gray = np.repeat(np.random.default_rng(0).normal(size=(4, 1, 3, 3)), 3, axis=1).astype(np.float32)
    opponent = gray * np.array([1, -1, 0], np.float32).reshape(1, 3, 1, 1)
    assert colour_share(gray) == pytest.approx(0, abs=1e-6)
    assert colour_share(opponent) == pytest.approx(1)


def test_confusion_counts_are_all_shown() -> None:
    counts = np.array([[5, 2], [0, 3]])
    drawn = ET.fromstring(confusion_chart(counts, ["apple", "pear"]))
    assert [text.text for text in drawn.iter("text") if text.get("class") == "count"] == ["5", "2", "3"]


def test_interval_is_wilsons() -> None:
    assert interval(352, 360) == "95.7 to 98.9 %"  # p = 0.97778, n = 360: 0.95675, 0.98869
    assert interval(10, 10) == "72.2 to 100.0 %"


def test_drawing_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_drawing(tmp_path / "file" / "net.svg", digits_config().model)
