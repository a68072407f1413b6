"""The report of a synthetic run folder, and its predictions on a real data set."""

import dataclasses
import html.parser
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.loader_data_set import load_reference, make_data_set
from tests.helpers.synthetic_run import digits_config, make_run, some_images
from trainer.errors import RunError, TrainerError
from trainer.planning.describe import count_crossings, count_layers
from trainer.report.net_drawing import format_bytes
from trainer.report.report import ImageRow, ImageSet, Report, predict_images, render_report, write_report
from trainer.report.run_data import read_run
from trainer.training.evaluate import evaluate_run


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


def one_line(page: str) -> str:
    """The text of a page as a browser flows it."""
    return " ".join(parse(page).text.split())


def test_report_asks_for_nothing_outside_itself(run: Path) -> None:
    page = render_report(Report(read_run(run), some_images()))
    assert all(address.startswith("data:") for address in parse(page).addresses)
    assert not re.search(r"url\(|@import|<script|<iframe", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_page_forbids_scripts_and_loads_from_outside(run: Path) -> None:
    page = render_report(Report(read_run(run), some_images()))
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules
    assert page.index(policy) < page.index("<style")


def test_report_says_the_result_of_the_run(run: Path) -> None:
    text = parse(render_report(Report(read_run(run), some_images()))).text
    for figure in ("97.78 %", "352 of 360 images", "99.72 %", "897", "440", "0123456789ab", "A CPU, 2 cores"):
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


def test_several_pairs_have_the_ledger_of_the_first(run: Path) -> None:
    """Its bytes per image are those of the net; what goes to other replicas is told apart."""
    record = read_run(run)
    halved = [row | {"bytes": row["bytes"] // 2} for row in record.result["ledger"] if row["kind"] == "crossing"]
    sums = {"kind": "replica", "name": "gradients", "phase": "backward", "direction": "a->a", "calls": 1, "bytes": 4321}
    result = record.result | {"processes": 4, "ledger": [*halved, sums]}
    text = parse(render_report(Report(dataclasses.replace(record, result=result)))).text.replace("\n", "")
    whole = parse(render_report(Report(record))).text.replace("\n", "")
    an_image = re.findall(r"[0-9,.]+ [kM]?B", whole.split("Bytes an image")[0])
    assert an_image and an_image == re.findall(r"[0-9,.]+ [kM]?B", text.split("Bytes an image")[0])
    assert "2 pairs of towers" in text
    assert "gradients, between replicas" in text and "all replica4,321" in text


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
    row = ImageRow(np.zeros((8, 8, 3), np.uint8), evil, evil, 0.5)
    page = render_report(Report(read_run(run), ImageSet([row], [], 0, 1, 1, np.eye(2, dtype=np.int64), [evil, '"x"'])))
    assert "<script" not in page
    parse(page)


def test_wall_time_is_that_of_all_parts(run: Path) -> None:
    """The result's, or that of the last row while there is none; and in how many starts."""
    record = read_run(run)
    assert "1.6minutes, evaluation included" in parse(render_report(Report(record))).text  # 93 s
    later = {"step": 40, "command": "python -m trainer train --resume run", "changed": {"train.epochs": [2, 3]}}
    steps = dataclasses.replace(record.steps, last={**record.steps.last, "elapsed_s": 240.0})
    killed = dataclasses.replace(record, result={}, steps=steps, environment=record.environment | {"resumed": [later]})
    text = parse(render_report(Report(killed))).text
    assert "4.0minutes, evaluation included; 2 starts" in text
    assert "Resumed at step 40" in text
    assert "python -m trainer train --resume run" in text
    assert "train.epochs 2 \u2192 3" in text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report-data") / "data"
    return make_data_set(folder, encoding="png", channels=1, size=(32, 32), train=64, val=70, shard_size=40)


@pytest.fixture(scope="module")
def reported(run: Path, data: Path) -> tuple[str, ImageSet]:
    """The report's text, and the predictions that went into it."""
    found: list[ImageSet] = []

    def record(*arguments: Any, **keywords: Any) -> ImageSet:
        found.append(predict_images(*arguments, **keywords))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.report.report.predict_images", record)
        page = write_report(run, data).read_text()
    return page, found[0]


def test_predictions_are_those_of_an_evaluation(run: Path, data: Path, reported: tuple[str, ImageSet]) -> None:
    found, evaluation = reported[1], evaluate_run(run, data)
    assert found.num_samples == evaluation.num_samples == 70
    assert found.num_samples - found.num_wrong == evaluation.num_correct_top1
    assert found.confusion is not None and found.confusion.sum() == 70
    assert np.trace(found.confusion) == evaluation.num_correct_top1
    assert all(row.wrong for row in found.wrong) and found.num_wrong > len(found.wrong) == 20
    confidences = [row.confidence for row in found.wrong]
    assert confidences == sorted(confidences, reverse=True)
    wrong = evaluation.labels != evaluation.predicted
    assert confidences[0] == pytest.approx(float(evaluation.confidence[wrong].max()))


def test_images_shown_are_the_crops_that_the_net_saw(data: Path, reported: tuple[str, ImageSet]) -> None:
    reference = list(load_reference(data, "val").values())
    for row, (pixels, label) in zip(reported[1].first, reference[:30], strict=True):
        assert row.label == str(label)
        np.testing.assert_array_equal(row.image, pixels[2:30, 2:30])


def test_part_of_a_split_is_called_a_part(run: Path, data: Path) -> None:
    found = predict_images(run, data, limit=10)
    assert (found.num_samples, found.num_in_split) == (64, 70)  # one whole batch
    assert "run over the first 64 of 70 images" in one_line(render_report(Report(read_run(run), found)))


def test_report_with_data_shows_images(reported: tuple[str, ImageSet]) -> None:
    page = parse(reported[0])
    assert "run over all 70 images" in one_line(reported[0])
    assert "The first 30, not selected" in page.text
    assert "64 train, 70 val; 10 classes" in page.text
    assert sum(address.startswith("data:image/png") for address in page.addresses) == 2 + 30 + 20


def test_data_that_does_not_fit_the_net_is_one_clear_error(run: Path, tmp_path: Path) -> None:
    make_data_set(tmp_path / "rgb", encoding="png", channels=3, size=(32, 32), train=64)
    with pytest.raises(TrainerError, match=r"model\.in_channels = 1"):
        write_report(run, tmp_path / "rgb")


def test_one_of_a_kind_is_not_called_many(tmp_path: Path) -> None:
    config = dataclasses.replace(digits_config(), train=dataclasses.replace(digits_config().train, batch_size=1))
    record = read_run(make_run(tmp_path / "run", config, steps=1))
    row = ImageRow(np.zeros((8, 8, 1), np.uint8), "3", "8", 0.5)
    found = ImageSet([row], [row], 1, 1, 1, np.array([[0, 1], [0, 0]]), ["3", "8"])
    record = dataclasses.replace(record, environment={"cores": 1}, result=record.result | {"epoch": 1.0})
    text = one_line(render_report(Report(record, found)))
    for words in (
        "trained for 1 step of",
        "step of 1 image,",
        "all 1 image:",
        "1 epoch ",
        ", 1 core;",
        "1 step and 0",
    ):
        assert words in text
    assert not re.search(r"(?<![\d.,])1 (steps|images|epochs|cores|mistakes|kernels|evaluations)\b", text)
