"""TensorBoard itself reads what the run's board wrote."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.training.loggers.tensorboard import TensorBoardWriter

ROW = {"kind": "step", "epoch": 0, "loss": 1.5, "learning_rate": 0.01, "gradient_norm": {"a": 3.0, "b": 4.0}}


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_every_float_of_a_row_is_a_scalar_of_its_step(tmp_path):
    board = TensorBoardWriter(tmp_path / "tensorboard", from_step=1)
    for step in (1, 2, 3):
        board.add(ROW | {"step": step, "loss": 1.5 / step})
    board.add({"kind": "evaluation", "step": 3, "epoch": 1.0, "split": "val", "top1": 0.75})
    board.close()
    found = read(tmp_path / "tensorboard")
    assert found["step/loss"] == [(1, 1.5), (2, 0.75), (3, 0.5)]
    assert found["step/gradient_norm_a"][-1] == (3, 3.0) and found["step/gradient_norm_b"][-1] == (3, 4.0)
    assert found["evaluation/top1"] == [(3, 0.75)]
    assert "step/epoch" not in found and "evaluation/split" not in found


def test_what_was_flushed_can_be_read_before_the_end(tmp_path):
    board = TensorBoardWriter(tmp_path, from_step=1)
    board.add(ROW | {"step": 1})
    board.flush()
    assert read(tmp_path)["step/learning_rate"] == [(1, pytest.approx(0.01))]
    board.close()


def test_a_resumed_run_takes_the_place_of_the_steps_it_repeats(tmp_path):
    first = TensorBoardWriter(tmp_path, from_step=1)
    for step in (1, 2, 3, 4):
        first.add(ROW | {"step": step, "loss": 9.0})
    first.close()
    second = TensorBoardWriter(tmp_path, from_step=3)
    second.add(ROW | {"step": 3, "loss": 1.0})
    second.close()
    assert read(tmp_path)["step/loss"] == [(1, 9.0), (2, 9.0), (3, 1.0)]
