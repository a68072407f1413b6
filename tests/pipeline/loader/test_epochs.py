"""Epochs, resuming, exact counts, and refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError, DatasetError
from pipeline.loader.batch import Batch, BatchShare
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.manifest import MANIFEST_NAME, read_manifest
from tests.helpers.loader_data_set import load_reference, make_data_set

CONFIG = LoaderConfig(crop_px=12, color="deviation", mean="image", threads=1)
ONCE = dataclasses.replace(CONFIG, shuffle="once")
NUM_TRAIN = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(
        tmp_path_factory.mktemp("epochs"), encoding="png", size=(16, 16), train=NUM_TRAIN, val=7, shard_size=5
    )


def open_training(data: Path, **arguments: Any) -> TrainingLoader:
    return TrainingLoader(data, arguments.pop("config", CONFIG), **{"batch_size": 4, "seed": 1, **arguments})


def read(loader: TrainingLoader, epochs: int) -> list[list[str]]:
    """Keys of each epoch."""
    return [[key for _ in range(loader.steps_per_epoch) for key in loader.next().keys] for _ in range(epochs)]


def identity(batch: Batch) -> tuple[Any, ...]:
    return (
        batch.epoch, batch.position, batch.keys, batch.draws.tobytes(), batch.fingerprint, batch.labels.tolist(),
        batch.images.numpy().tobytes(),
    )  # fmt: skip


def test_every_key_once_an_epoch_in_another_order_and_the_same_on_both_towers(data: Path) -> None:
    epochs = read(open_training(data), 3)
    expected = sorted(f"train-{number:08d}" for number in range(NUM_TRAIN))
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, expected]}) == 4
    assert read(open_training(data), 3) == epochs
    assert read(open_training(data, seed=2), 1)[0] != epochs[0]


def test_towers_get_equal_batches(data: Path) -> None:
    towers = (
        open_training(data),
        open_training(data, config=LoaderConfig(**{**vars(CONFIG), "prefetch": 4, "threads": 2})),
    )
    for _ in range(8):
        a, b = (tower.next() for tower in towers)
        assert identity(a) == identity(b)


def test_the_last_partial_batch_is_dropped_and_the_next_epoch_is_whole(data: Path) -> None:
    loader = open_training(data, batch_size=7)
    assert loader.steps_per_epoch == 3
    batches = [loader.next() for _ in range(7)]
    assert [(batch.epoch, batch.position) for batch in batches] == [(i // 3, i % 3) for i in range(7)]
    for epoch in (batches[:3], batches[3:6]):
        keys = [key for batch in epoch for key in batch.keys]
        assert len(keys) == len(set(keys)) == 21


@pytest.mark.parametrize("last_batch", ["drop", "partial"])
def test_once_gives_the_stored_order_every_epoch(data: Path, last_batch: str) -> None:
    config = dataclasses.replace(ONCE, last_batch=last_batch)
    epochs = read(open_training(data, config=config, batch_size=7), 4)
    assert epochs[0] == [f"train-{number:08d}" for number in range(21 if last_batch == "drop" else NUM_TRAIN)]
    assert all(epoch == epochs[0] for epoch in epochs)
    loader = open_training(data, config=config, batch_size=7)
    first, second = ([loader.next().draws for _ in range(loader.steps_per_epoch)] for _ in range(2))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second)), "crops are drawn anew every epoch"


@pytest.mark.parametrize("shuffle", ["epoch", "once"])
@pytest.mark.parametrize("batch_size", [5, 7, 24, 30])
def test_a_partial_batch_has_the_rest_of_the_epoch(data: Path, shuffle: str, batch_size: int) -> None:
    """Every key once an epoch; its images are those of the same samples and draws, as NumPy cuts them."""
    config = dataclasses.replace(
        CONFIG if shuffle == "epoch" else ONCE, last_batch="partial", mean="none", color="none"
    )
    loader = open_training(data, config=config, batch_size=batch_size)
    stored = load_reference(data)
    assert loader.steps_per_epoch == -(-NUM_TRAIN // batch_size)
    for epoch in range(4):
        keys: list[str] = []
        for position in range(loader.steps_per_epoch):
            batch = loader.next()
            size = min(batch_size, NUM_TRAIN - position * batch_size)
            assert (batch.epoch, batch.position, len(batch.keys)) == (epoch, position, size)
            assert len(batch.images) == len(batch.labels) == len(batch.draws) == size
            for key, image, label, (x, y, mirror) in zip(
                batch.keys, batch.images.numpy(), batch.labels.tolist(), batch.draws.tolist(), strict=True
            ):
                crop = stored[key][0][y : y + 12, x : x + 12]
                assert np.array_equal(image, (crop[:, ::-1] if mirror else crop).transpose(2, 0, 1))
                assert label == stored[key][1]
            keys += batch.keys
        assert sorted(keys) == [f"train-{number:08d}" for number in range(NUM_TRAIN)]


def test_what_does_not_go_together_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"last_batch is 'partial': expected 'drop' with data\.decode = 'sharded'"):
        dataclasses.replace(CONFIG, last_batch="partial", decode="sharded")
    partial = dataclasses.replace(CONFIG, last_batch="partial")
    with pytest.raises(ConfigError, match="last_batch is 'partial': expected 'drop' with more than one replica"):
        open_training(data, config=partial, share=BatchShare(0, 2))


@pytest.mark.parametrize(
    ("batch_size", "changes"),
    [(4, {"prefetch": 1}), (5, {"prefetch": 2}), (5, {"prefetch": 5}), (7, {"shuffle": "once"}),
     (7, {"last_batch": "partial"}), (7, {"shuffle": "once", "last_batch": "partial"})],
)  # fmt: skip
def test_interrupted_equals_uninterrupted(data: Path, batch_size: int, changes: dict[str, Any]) -> None:
    config = LoaderConfig(**{**vars(CONFIG), **changes})
    steps = 3 * (NUM_TRAIN // batch_size + (config.last_batch == "partial"))
    loader = open_training(data, config=config, batch_size=batch_size)
    states, whole = [loader.state()], []
    for _ in range(steps + 3):
        whole.append(identity(loader.next()))
        states.append(json.loads(json.dumps(loader.state())))
    for cut in range(steps + 1):  # every step, so also the first, the middle and the end of three epochs
        resumed = open_training(data, config=config, batch_size=batch_size, state=states[cut])
        assert resumed.state() == states[cut]
        assert [identity(resumed.next()) for _ in range(3)] == whole[cut : cut + 3], cut
        assert resumed.state() == states[cut + 3]


def test_resuming_twice(data: Path) -> None:
    arguments = {"batch_size": 2}
    loader = open_training(data, **arguments)
    for _ in range(5):
        loader.next()
    once = open_training(data, state=loader.state(), **arguments)
    assert identity(loader.next()) == identity(once.next())
    twice = open_training(data, state=once.state(), **arguments)
    for _ in range(6):
        assert identity(loader.next()) == identity(twice.next())


@pytest.mark.parametrize(
    "changed",
    [{"mean": "none"}, {"mean": "image_center"}, {"normalize": "per_image"}, {"color": "none"}, {"prefetch": 4}],
)
def test_a_state_continues_under_another_recipe(data: Path, changed: dict[str, Any]) -> None:
    loader = open_training(data, batch_size=5)
    for _ in range(6):
        loader.next()
    other = LoaderConfig(**{**vars(CONFIG), **changed})
    moved = open_training(data, batch_size=5, config=other, state=loader.state())
    for _ in range(6):
        a, b = loader.next(), moved.next()
        assert a.keys == b.keys and np.array_equal(a.draws, b.draws)
    assert moved.state() == loader.state()


def test_state_tells_the_next_batch(data: Path) -> None:
    loader = open_training(data, batch_size=7)
    for _ in range(8):
        state = loader.state()
        batch = loader.next()
        assert (state["epoch"], state["position"]) == (batch.epoch, batch.position)


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"seed": 9}, "seed"), ({"batch_size": 3}, "batch size"),
     ({"config": LoaderConfig(**{**vars(CONFIG), "last_batch": "partial"})}, "last_batch"),
     ({"config": ONCE}, "shuffle")],
)  # fmt: skip
def test_a_state_of_another_run_is_refused_by_name(data: Path, changed: dict[str, Any], name: str) -> None:
    loader = open_training(data)
    loader.next()
    with pytest.raises(DatasetError, match=f"saved with {name} "):
        open_training(data, state=loader.state(), **changed)


def test_a_state_of_another_data_set_is_refused(data: Path, tmp_path: Path) -> None:
    other = make_data_set(tmp_path, encoding="png", size=(16, 16), train=NUM_TRAIN - 1, val=7)
    with pytest.raises(DatasetError, match="saved with another data set than "):
        open_training(data, state=open_training(other).state())


@pytest.mark.parametrize(
    "damage", [{"epoch": None}, {"epoch": -1}, {"epoch": True}, {"position": "1"}, {"position": 6}, {"position": -1}]
)
def test_a_damaged_state_is_refused(data: Path, damage: dict[str, Any]) -> None:
    loader = open_training(data)
    loader.next()
    with pytest.raises(DatasetError, match="state is damaged"):
        open_training(data, state={**loader.state(), **damage})


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8])
def test_evaluation_sees_every_image_once_whatever_the_batch(data: Path, batch_size: int) -> None:
    loader = EvaluationLoader(data, CONFIG, batch_size=batch_size)
    assert loader.num_samples == 7
    for _ in range(2):  # it can be iterated again
        batches = list(loader)
        assert [key for batch in batches for key in batch.keys] == [f"val-{number:08d}" for number in range(7)]
        assert sum(len(batch.images) for batch in batches) == sum(len(batch.labels) for batch in batches) == 7


def test_an_abandoned_evaluation_starts_again(data: Path) -> None:
    loader = EvaluationLoader(data, CONFIG, batch_size=2)
    first = next(iter(loader)).keys
    assert next(iter(loader)).keys == first == ("val-00000000", "val-00000001")


def _damaged(tmp_path: Path) -> Path:
    return make_data_set(tmp_path / "d", encoding="png", size=(16, 16), train=12, val=3)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train/train-000001.tar", Path.unlink, "train-000001.tar is missing"),
        ("train/train-000001.tar", _truncate, "train-000001.tar has .* the manifest records"),
        ("train/train-000000.idx", Path.unlink, "train-000000.idx cannot be read"),
        ("train/train-000000.idx", _flip, "train-000000.idx is not the index"),
        ("statistics.npz", _flip, "statistics.npz is not the file"),
        ("manifest.json", Path.unlink, "has no manifest.json"),
        ("manifest.json", _truncate, "manifest.json is damaged"),
    ],
)
def test_a_data_set_that_is_not_whole_is_refused_by_name(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    folder = _damaged(tmp_path)
    damage(folder / name)
    with pytest.raises(DatasetError, match=message) as caught:
        open_training(folder)
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch size is 0"):
        open_training(data, batch_size=0)
    with pytest.raises(ConfigError, match="batch size 25 is more than the 24 training samples"):
        open_training(data, batch_size=25)
    with pytest.raises(ConfigError, match="device is 'tpu"):
        open_training(data, device="tpu")
    with pytest.raises(DatasetError, match="no split 'test': it has train, val"):
        EvaluationLoader(data, CONFIG, batch_size=1, split="test")
    with pytest.raises(ConfigError, match="views is 'five'"):
        EvaluationLoader(data, CONFIG, batch_size=1, views="five")
    with pytest.raises(DatasetError, match="no data set folder"):
        open_training(tmp_path / "nowhere")


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folder = _damaged(tmp_path)
    manifest = read_manifest(folder)
    mixed = dataclasses.replace(manifest, image=dataclasses.replace(manifest.image, height_px=None, width_px=None))
    (folder / MANIFEST_NAME).write_text(mixed.to_json())
    with pytest.raises(DatasetError, match="different sizes: prepare it with --resize"):
        open_training(folder)


def held(data: Path) -> set[str]:
    """The tars of a data set that this process has open or mapped."""
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    opened = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    return {name for name in mapped | opened if name.startswith(str(data)) and name.endswith(".tar")}


@pytest.mark.parametrize("mmap", [True, False])
def test_a_closed_loader_lets_go_of_its_files(data: Path, mmap: bool) -> None:
    """At once, not when Python next looks for circles: the folder may have to be unmounted."""
    loader = open_training(data, config=dataclasses.replace(CONFIG, mmap=mmap))
    batch = loader.next()
    pixels = batch.images.clone()
    assert held(data)
    loader.close()
    assert not held(data)
    assert batch.images.equal(pixels)
