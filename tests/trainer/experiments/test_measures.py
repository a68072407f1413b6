"""What is measured of a run: colors by hand, epochs by hand, neighbors and views as other ways find them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.loader_data_set import load_reference, make_data_set
from trainer.errors import RunError
from trainer.experiments import measures
from trainer.experiments.folder import RunTask
from trainer.experiments.measures import color_energy, color_share, epochs_to, gap_by_chance
from trainer.training.evaluate import evaluate_run
from trainer.training.run_folder import read_run_config


def task_of(run: Path, folder: Path) -> RunTask:
    """A run as the only one of an experiment."""
    task = RunTask("baseline", 0, read_run_config(run), folder, 1)
    shutil.copytree(run, task.run)
    return task


def kernels(*colors: tuple[float, float, float]) -> np.ndarray:
    """Kernels of 2x2 px of one color each, float32 (maps, 3, 2, 2)."""
    return np.array(colors, np.float32)[:, :, None, None] * np.ones((1, 1, 2, 2), np.float32)


def test_color_by_hand() -> None:
    """Gray (1, 1, 1): no color. (1, 0, -1): nothing else. (3, 0, 0): gray part (1, 1, 1), so 6 of 9."""
    energy = color_energy(kernels((1, 1, 1), (1, 0, -1), (3, 0, 0)))
    assert energy.tolist() == [[12, 0], [8, 8], [36, 24]]
    assert [color_share(energy[place : place + 1]) for place in range(3)] == pytest.approx([0, 1, 2 / 3])
    assert color_share(energy) == pytest.approx(32 / 56), "kernels count by their energy"
    assert color_share(np.zeros((3, 2))) == 0


def test_chance_makes_a_gap_of_mixed_kernels_and_none_of_sorted_ones() -> None:
    gray, colored = kernels(*[(1, 1, 1)] * 8), kernels(*[(1, 0, -1)] * 8)
    apart, mixed = np.concatenate([gray, colored]), np.concatenate([gray[:4], colored[:4], gray[4:], colored[4:]])
    for weight, low, high in ((apart, 0.0, 0.01), (mixed, 0.99, 1.0)):
        energy = color_energy(weight)
        gap = abs(color_share(energy[:8]) - color_share(energy[8:]))
        assert low < gap_by_chance(energy, gap) <= high


@pytest.mark.parametrize(
    ("errors", "level", "expected"),
    [
        ((0.9, 0.5, 0.1), 0.3, 2.5),
        ((0.9, 0.3, 0.1), 0.3, 2.0),
        ((0.9, 0.2, 0.4, 0.1), 0.25, 1 + 0.65 / 0.7),
        ((0.2, 0.1), 0.25, None),
        ((0.2, 0.4, 0.1), 0.25, None),
        ((0.9, 0.5), 0.25, None),
        ((), 0.25, None),
    ],
    ids=["between", "at an evaluation", "the first time", "within the first epoch", "also later", "never", "no curve"],
)  # fmt: skip
def test_epochs_by_hand(errors: tuple[float, ...], level: float, expected: float | None) -> None:
    curve = [(float(epoch), error) for epoch, error in enumerate(errors, 1)]
    assert epochs_to(curve, level) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("encoding", ["png", "raw", "jpeg"])
def test_stored_images_are_those_of_the_tars_in_their_order(encoding: str, tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", encoding=encoding, size=(18, 16), train=12, val=2, shard_size=5)
    expected = list(load_reference(data).values())
    found = list(measures.stored_images(data, "train", 7))
    assert len(found) == 7
    for (image, label), (other, other_label) in zip(found, expected, strict=False):
        assert label == other_label and (image == other).all()


def test_views_are_what_evaluate_says(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    task = task_of(tiny_run, tmp_path)
    found = measures.measure("views", task, tiny_data, "cpu")
    for views in ("center", "ten"):
        other = evaluate_run(tiny_run, tiny_data, views=views)
        assert found.figures[f"top1_{views}"] == pytest.approx(1 - other.top1)
        assert other.top5 is not None and found.figures[f"top5_{views}"] == pytest.approx(1 - other.top5)
        assert found.arrays[views].shape == (10, 10) and (found.arrays["labels"] == other.labels).all()
        assert found.arrays[views].sum(axis=1) == pytest.approx(np.ones(10), abs=1e-5)
    ten, center = found.figures["top1_ten"], found.figures["top1_center"]
    assert ten is not None and center is not None and found.figures["top1_views_gain"] == ten - center


def test_neighbors_are_the_nearest_by_fc7(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    from trainer.inference import load

    task = task_of(tiny_run, tmp_path)
    found = measures.measure("neighbors", task, tiny_data, "cpu")
    net = load(tiny_run)
    train, val = (list(load_reference(tiny_data, split).values()) for split in ("train", "val"))
    codes = net.features([image for image, _ in train])
    hits = []
    for place, (image, label) in enumerate(val):
        distances = np.linalg.norm(codes.astype(float) - net.features(image).astype(float), axis=1)
        nearest = np.argsort(distances, kind="stable")[:6]
        hits += [train[other][1] == label for other in nearest]
        if place < 8:
            for shown, other in zip(found.arrays["nearest"][place], nearest, strict=True):
                assert (shown == net.crop(train[other][0])).all()
    assert found.figures["same_class_fc7"] == pytest.approx(np.mean(hits))
    words = json.loads(str(found.arrays["words"]))
    assert words["titles"] == [str(label) for _, label in val[:8]] and len(words["classes"][0]) == 5
    assert words["classes"][0][0][0] == net.classify(val[0][0])[0].classes[0].title


def test_colors_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    from tests.helpers.tiny_run import OVERRIDES
    from tests.helpers.training_commands import CONFIG, call

    data = make_data_set(tmp_path / "data", encoding="png", size=(32, 32), train=8, val=4)
    words = [word for text in (*OVERRIDES, "model.in_channels=3", "train.epochs=1") for word in ("--set", text)]
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "train", "--config", CONFIG, *words, "--data", data, "--run", tmp_path / "run") == 0
    task = task_of(tmp_path / "run", tmp_path / "experiment")
    found = measures.measure("color", task, data, "cpu")
    from trainer.inference import load

    weight = load(tmp_path / "run").kernels().transpose(0, 3, 1, 2)
    for tower, half in zip("ab", np.split(weight, 2), strict=True):
        assert (found.arrays[f"kernels_{tower}"] == half).all()
        assert found.figures[f"color_{tower}"] == pytest.approx(color_share(color_energy(half)))
    a, b = found.figures["color_a"], found.figures["color_b"]
    assert a is not None and b is not None and found.figures["color_gap"] == abs(a - b)


def test_arrays_that_are_damaged_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    measures.save(path, {"a": np.arange(3)})
    assert measures.load(path)["a"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:20])
    assert measures.load(path) == {} and measures.load(tmp_path / "none.npz") == {}
    with pytest.raises(RunError, match="cannot be written"):
        measures.save(path / "below.npz", {"a": np.arange(3)})
    measures.save(tmp_path / "nothing.npz", {})
    assert not (tmp_path / "nothing.npz").exists()


def test_a_run_that_was_not_evaluated_on_training_images_has_no_epochs(tiny_run: Path, tmp_path: Path) -> None:
    found = measures.measure("epochs", task_of(tiny_run, tmp_path), tmp_path, "cpu")
    assert found.figures == {"epochs_to_25": None, "epochs_to_10": None, "epochs_to_5": None}
