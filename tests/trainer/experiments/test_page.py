"""The page and the tables of made-up rows: what is claimed, what is told, and that nothing outside is asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.recipes import recipe
from tests.trainer.report.test_report import parse
from trainer.experiments import measures, tables
from trainer.experiments.catalog import make_experiment
from trainer.experiments.folder import Row, RunTask
from trainer.experiments.page import render, write_results
from trainer.experiments.summary import Summary, summarize, to_json

BASE = recipe("photo-crops")


def summary_of(name: str, folder: Path, figures: dict[str, dict[str, list[float | None]]]) -> Summary:
    """Rows from variant -> figure -> a value a seed; None: that run failed."""
    experiment = make_experiment(name, BASE)
    tasks, rows = [], []
    for variant, columns in figures.items():
        for seed in range(len(next(iter(columns.values())))):
            tasks.append(RunTask(variant, seed, BASE, folder, 1))
            row: Row = {"variant": variant, "seed": seed, "split": "val"}
            values = {key: column[seed] for key, column in columns.items()}
            if None in values.values():
                row |= {"status": "failed", "exit_code": 4, "reason": f"lost <{variant}>"}
            else:
                row |= {"status": "ok", "top1_error": 0.5, "top5_error": None, "loss": 1.0, **values}
            rows.append(row)
    return summarize(experiment.only(list(figures)), tasks, rows)


def test_a_difference_is_claimed_only_where_the_interval_does_not_span_zero(tmp_path: Path) -> None:
    summary = summary_of(
        "ablations",
        tmp_path,
        {
            "baseline": {"top1_error": [0.10, 0.11, 0.12, 0.10]},
            "no-dropout": {"top1_error": [0.13, 0.15, 0.15, 0.14]},
            "half-size": {"top1_error": [0.09, 0.12, 0.11, 0.12]},
            "no-overlap": {"top1_error": [0.08, 0.10, 0.10, 0.09]},
        },
    )
    said = {cells[0]: cells for cells in map(tables.compared_cells, summary.of_metric(summary.experiment.metrics[0]))}
    assert said["no dropout"][7] == "higher" and said["no dropout"][2] == "+3.50" and said["no dropout"][5] == "4 of 4"
    assert said["one tower of half size"][7] == "no difference seen"
    assert said["pooling without overlap"][7] == "lower" and "ILSVRC-2012" in said["pooling without overlap"][8]
    page = render(tmp_path, summary)
    collector = parse(page)
    assert all(address.startswith("data:") for address in collector.addresses)
    assert page.count("no difference seen") == 1 and "+0.39 top-1, +0.30 top-5" in collector.text
    found = {
        row["variant"]: row["claim"] for row in json.loads(to_json(summary))["compared"] if "top1" in row["metric"]
    }
    assert found == {"no-dropout": True, "half-size": False, "no-overlap": True}


def test_failed_runs_are_told_before_any_figure_and_are_in_none(tmp_path: Path) -> None:
    figures: dict[str, dict[str, list[float | None]]] = {
        "baseline": {"top1_error": [0.1, 0.2, None]},
        "no-dropout": {"top1_error": [None, 0.3, 0.4]},
    }
    summary = summary_of("ablations", tmp_path, figures)
    (compared,) = summary.of_metric(summary.experiment.metrics[0])
    assert compared.found.seeds == (1,) and compared.found.unpaired == (0, 2)
    assert tables.compared_cells(compared)[1] == "1 (2 missing)"
    assert tables.compared_cells(compared)[7] == "no interval: one seed only"
    head, rows = tables.values_table(summary)
    assert rows[0][:3] == ["the whole recipe", "2, 1 failed", "15.00 (10.00 to 20.00)"] and head[2] == "top-1 error, %"
    text = parse(render(tmp_path, summary)).text
    assert text.index("lost <baseline>") < text.index("Top-1 error") and "lost <no-dropout>" in text
    markdown = tables.markdown(summary)
    assert "failed, in no figure: baseline, seed 2: lost <baseline>" in markdown and "4 runs of 6" not in text


def test_before_any_run_has_ended_there_is_a_page(tmp_path: Path) -> None:
    experiment = make_experiment("ablations", BASE)
    tasks = [RunTask("baseline", 0, BASE, tmp_path, 1)]
    path = write_results(tmp_path, experiment, tasks, [])
    assert "0 of 1" in parse(path.read_text()).text and "nothing is compared" in path.read_text()


def test_figure_1_compares_the_quickest_of_each(tmp_path: Path) -> None:
    """Its rate counts only where all seeds came to the level; tanh at a third never does in one of them."""
    summary = summary_of(
        "figure-1",
        tmp_path,
        {
            "relu-same": {"epochs_to_25": [2.0, 3.0]},
            "relu-third": {"epochs_to_25": [1.0, 9.0]},
            "tanh-same": {"epochs_to_25": [10.0, 20.0]},
            "tanh-third": {"epochs_to_25": [1.0, float("nan")]},
        },
    )
    first = summary.levels[0]
    assert first.relu is not None and first.tanh is not None
    assert (first.relu[0].name, first.relu[1]) == ("relu-same", 2.5)
    assert (first.tanh[0].name, first.tanh[1]) == ("tanh-same", 15.0) and first.ratio == 6
    assert tables.levels_table(summary)[0] == [
        "25 %", "2.50 (ReLU, same rate)", "15.00 (tanh, same rate)", "6.00", "6 (CIFAR-10, four layers)",
    ]  # fmt: skip
    assert summary.levels[1].ratio is None and "6.00" in parse(render(tmp_path, summary)).text


def test_several_nets_are_averaged_by_their_probabilities(tmp_path: Path) -> None:
    """Two nets that are each wrong of one image of two, and right together of both."""
    keys = [f"{count}_{views}" for count in ("top1", "top5") for views in ("center", "ten")]
    columns: dict[str, list[float | None]] = {key: [0.5, 0.5] for key in keys}
    shares = np.zeros((2, 2, 7), np.float32)  # of two nets, two images
    shares[0, :, 0], shares[0, :, 1] = (0.9, 0.6), (0.1, 0.4)
    shares[1, :, 0], shares[1, :, 1] = (0.45, 0.2), (0.55, 0.8)
    (tmp_path / "measured").mkdir()
    for seed in range(2):
        arrays: dict[str, Any] = {"center": shares[seed], "ten": shares[seed], "labels": np.array([0, 1])}
        measures.save(RunTask("baseline", seed, BASE, tmp_path, 1).measured, arrays)
    summary = summary_of("views", tmp_path, {"baseline": columns | {"top1_views_gain": [-0.02, -0.01]}})
    center, _ = summary.averages
    assert center.single == {"top1": 0.5, "top5": 0.5} and center.together["top1"] == 0 and center.seeds == (0, 1)
    assert tables.gains_table(summary)[0][1] == "-1.50" and "-1.50" in render(tmp_path, summary)


def test_kernels_and_colors_are_shown_by_seed_and_tower(tmp_path: Path) -> None:
    keys = ("color_a", "color_b", "color_gap", "gap_by_chance")
    columns: dict[str, list[float | None]] = {key: [0.2, 0.3] for key in keys}
    (tmp_path / "measured").mkdir()
    generator = np.random.default_rng(0)
    for variant in ("baseline", "no-crossings"):
        for seed in range(2):
            arrays = {f"kernels_{tower}": generator.normal(size=(6, 3, 7, 7)).astype(np.float32) for tower in "ab"}
            measures.save(RunTask(variant, seed, BASE, tmp_path, 1).measured, arrays)
    summary = summary_of("figure-3", tmp_path, {"baseline": columns, "no-crossings": columns})
    collector = parse(render(tmp_path, summary))
    assert collector.text.count("of the energy is color") == 8 and len(collector.addresses) == 9
    assert len(tables.color_table(summary)) == 4 and "tower a, %" in tables.markdown(summary)
    assert {each.metric.key for each in summary.compared} == {"color_gap", "top1_error"}


def test_neighbors_are_shown_with_their_likeliest_classes(tmp_path: Path) -> None:
    (tmp_path / "measured").mkdir()
    classes = [[["cat", 0.7], ["<b>", 0.2]]] * 2
    arrays = {
        "asked": np.zeros((2, 4, 4, 3), np.uint8),
        "nearest": np.zeros((2, 6, 4, 4, 3), np.uint8),
        "words": np.array(json.dumps({"titles": ["cat", "dog"], "classes": classes})),
    }
    measures.save(RunTask("baseline", 0, BASE, tmp_path, 1).measured, arrays)
    columns: dict[str, list[float | None]] = {
        key: [0.4] for key in ("same_class_fc7", "same_class_pixels", "same_class_gain")
    }
    page = render(tmp_path, summary_of("figure-4", tmp_path, {"baseline": columns}))
    collector = parse(page)
    assert "70.0 %" in collector.text and "<b>" in collector.text and page.count("<img") == 14
    assert page.count('class="true"') == 1, "the true class stands out, where it is among them"


@pytest.mark.parametrize("value", ["a|b", "x"])
def test_a_bar_in_a_text_does_not_break_the_table(value: str, tmp_path: Path) -> None:
    lines = tables.markdown_table(["one", "two"], [[value, "y"]])
    assert lines[2].replace("\\|", "").count("|") == 3
