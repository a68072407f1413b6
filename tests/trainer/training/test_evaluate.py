"""Evaluations: counts by hand, class tables, the confusion image, ten views, JSON."""

import io
import json
import shutil
import struct
import tracemalloc
import types

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional

from pipeline.loader.batch import Batch, BatchShare
from pipeline.loader.batches import EvaluationLoader
from tests.helpers.loader_data_set import make_data_set
from tests.helpers.synthetic_run import digits_config, make_run
from trainer.__main__ import main
from trainer.errors import CheckpointError, RunError
from trainer.report import confusion
from trainer.training import checkpoint
from trainer.training import evaluate as evaluate_module
from trainer.training.evaluate import Evaluation, count_net, evaluate_net, evaluate_run, load_network

pytestmark = pytest.mark.numeric

TITLES = ["ant", "bee", "cat", "dog", "elk", "fox", "[red]gnu"]


class Lookup(torch.nn.Module):
    """A net whose logits are its input: images (N, 7, 1, 1)."""

    towers = ("a", "b")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def batch_of(logits: torch.Tensor, labels: list[int]) -> Batch:
    count = len(labels)
    keys = tuple(f"val-{i:08d}" for i in range(count))
    draws = np.zeros((count, 3), np.int32)
    return Batch(logits, torch.tensor(labels), keys, draws, epoch=0, position=0, fingerprint=0)


def evaluate(rows: list[list[float]], labels: list[int]):
    logits = torch.tensor(rows)[:, :, None, None]
    return evaluate_net(Lookup(), [batch_of(logits, labels)])


@pytest.fixture
def four():
    """Images of classes 0, 0, 1 and 2, predicted as 0, 1, 1 and 3; the last has its label in seventh place."""
    return evaluate(
        [
            [9.0, 0, 0, 0, 0, 0, 0],
            [5.0, 6, 0, 0, 0, 0, 0],
            [0, 7.0, 1, 0, 0, 0, 0],
            [3.0, 4, -5, 9, 2, 1, 0],
        ],
        [0, 0, 1, 2],
    )


def test_counts(four):
    assert (four.num_samples, four.num_correct_top1, four.num_correct_top5) == (4, 2, 3)
    assert four.predicted.tolist() == [0, 1, 1, 3]
    assert four.in_top5.tolist() == [True, True, True, False]
    assert four.sentence().startswith("top-1 0.5000 (2 of 4), top-5 0.7500 (3 of 4), center, loss ")


def test_the_fifth_counts_and_the_sixth_does_not():
    falling = [7.0, 6, 5, 4, 3, 2, 1]
    found = evaluate([falling] * 3, [4, 5, 0])
    assert (found.num_correct_top1, found.num_correct_top5) == (1, 2)
    assert found.in_top5.tolist() == [True, False, True]


def test_top5_of_fewer_than_six_classes_is_not_shown():
    """All of five classes are among the five likeliest: that says nothing."""
    five = evaluate([[5.0, 4, 3, 2, 1]] * 2, [4, 0])
    assert (five.top5, five.num_correct_top5, five.to_dict()["top5"]) == (None, None, None)
    assert five.sentence() == f"top-1 0.5000 (1 of 2), center, loss {five.loss:.4f}"
    assert evaluate([[6.0, 5, 4, 3, 2, 1]], [5]).top5 == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_net_goes_on_in_the_mode_it_was_in(training):
    """Else all steps after the first evaluation would train without dropout."""
    net = Lookup().train(training)
    assert evaluate_net(net, [batch_of(torch.eye(7)[:, :, None, None], list(range(7)))]).top1 == 1
    assert net.training == training


def test_ten_views_average_probabilities_not_logits():
    views = torch.randn(3, 10, 7, 1, 1, generator=torch.Generator().manual_seed(0)) * 6
    found = evaluate_net(Lookup(), [batch_of(views, [0, 1, 2])], "ten")
    expected = functional.softmax(views[..., 0, 0].double(), dim=2).mean(1)
    np.testing.assert_allclose(found.confidence, expected.max(1).values, rtol=1e-5)
    by_logits = functional.softmax(views[..., 0, 0].double().mean(1), dim=1)
    assert not np.allclose(found.confidence, by_logits.max(1).values, rtol=1e-2)


def test_what_is_kept_of_a_batch_does_not_grow_with_the_classes():
    """Bytes an image: label, prediction, confidence, hit, likelihood; a view would hold all its probabilities."""

    def kept_bytes(classes: int) -> int:
        logits = torch.zeros(8, classes, 1, 1)
        (scores,) = evaluate_module._score_batches(Lookup(), [batch_of(logits, [0] * 8)], "center")
        tensors = [value for value in vars(scores).values() if isinstance(value, torch.Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert kept_bytes(10) == kept_bytes(20_000) < 8 * 40


def test_counts_alone_equal_those_with_predictions(four):
    rows = torch.randn(20, 7, 1, 1, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(20) % 7
    batches = [batch_of(rows[begin : begin + 6], labels[begin : begin + 6].tolist()) for begin in range(0, 20, 6)]
    assert count_net(Lookup(), batches).to_dict() == evaluate_net(Lookup(), batches).to_dict()


def test_replicas_add_what_they_counted():
    """Also one that had no batch: it does not know how many classes there are."""

    class Replicas:
        def gather(self, words):
            mine = list(words)
            return [mine, [3, 2, 3, *_bits(-1.5), 7], [0, 0, 0, *_bits(0.0), 0]]

    def _bits(figure):
        return [struct.unpack("<q", struct.pack("<d", figure))[0]]

    mesh = types.SimpleNamespace(replicas=Replicas())
    found = count_net(Lookup(), [batch_of(torch.eye(7)[:, :, None, None] * 100, list(range(7)))], mesh)
    assert (found.num_samples, found.num_correct_top1, found.num_correct_top5) == (10, 9, 10)
    assert found.loss == pytest.approx(0.15)
    nothing = count_net(Lookup(), [], mesh)
    assert (nothing.num_samples, nothing.num_correct_top5) == (3, 3)


def test_classes_by_hand(four):
    scores = confusion.score_classes(four, TITLES)
    assert [score.num_samples for score in scores] == [2, 1, 1, 0, 0, 0, 0]
    assert [score.top1 for score in scores] == [0.5, 1.0, 0.0, None, None, None, None]
    assert [score.top5 for score in scores[:3]] == [1.0, 1.0, 0.0]
    assert [(score.taken_for, score.num_taken_for) for score in scores[:3]] == [("bee", 1), ("", 0), ("dog", 1)]


def test_table_has_the_worst_class_first_and_names_as_they_are(four):
    text = io.StringIO()
    confusion.print_classes(four, TITLES, Console(file=text, width=100))
    lines = [line.split()[1] for line in text.getvalue().splitlines() if line.startswith("│")]
    assert lines == ["cat", "ant", "bee", "dog", "elk", "fox", "[red]gnu"]


def test_json_holds_classes_and_every_cell(four):
    found = json.loads(json.dumps(four.to_dict() | confusion.to_dict(four, TITLES)))
    assert found["top1"] == 0.5
    assert found["confusion"] == [[0, 0, 1], [0, 1, 1], [1, 1, 1], [2, 3, 1]]
    assert found["per_class"][0]["title"] == "ant" and found["per_class"][0]["top1"] == 0.5
    assert found["per_class"][4]["top1"] is None


def test_image_shows_what_was_counted(tmp_path):
    right = [[9.0 if i == label else 0.0 for i in range(7)] for label in range(7)]
    confusion.draw(tmp_path / "right.png", evaluate(right, list(range(7))), TITLES)
    confusion.draw(tmp_path / "wrong.png", evaluate(right[:6] + right[:1], list(range(7))), TITLES)
    images = [np.asarray(Image.open(tmp_path / name).convert("L"), int) for name in ("right.png", "wrong.png")]
    assert images[0].shape == images[1].shape
    assert images[0].shape[0] > 500
    changed = np.argwhere(np.abs(images[0] - images[1])[100:] > 60)  # below the title, whose figure differs too
    height, width = images[0].shape
    assert len(changed) > 1000
    assert 100 + changed[:, 0].min() > height * 0.6  # the last row: its first and its last cell
    assert np.ptp(changed[:, 1]) > width * 0.4


def many(classes: int, images: int) -> Evaluation:
    """A made-up evaluation: every image of class i is taken for class i or i + 1."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, images)
    predicted = (labels + random.integers(0, 2, images)) % classes
    shares = np.ones(images, np.float32)
    return Evaluation(images, 0, 0, 0.0, "center", ("k",) * images, labels, predicted, shares, labels == predicted)


def test_thousands_of_classes_take_memory_of_images_not_of_classes_squared(tmp_path):
    """A dense matrix of 21,841 classes would be 3.8 GB; the table has the worst, the drawing neighbors together."""
    found, titles = many(21_841, 1000), [f"class {label}" for label in range(21_841)]
    tracemalloc.start()
    table = confusion.to_dict(found, titles)
    text = io.StringIO()
    confusion.print_classes(found, titles, Console(file=text, width=100))
    confusion.draw(tmp_path / "confusion.png", found, titles)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    assert sum(count for _, _, count in table["confusion"]) == 1000 and len(table["per_class"]) == 21_841
    assert text.getvalue().splitlines()[0].startswith("the worst 100 of 21,841 classes; --json has all")
    assert len(text.getvalue().splitlines()) == 100 + 5


def test_neighbors_that_share_a_cell_are_added_up():
    found = many(1000, 3000)
    dense, binned = confusion.count_pairs(found, 1000), confusion._binned(found, 1000, 4)
    assert np.array_equal(binned, dense.reshape(250, 4, 250, 4).sum((1, 3)))
    scores = confusion.score_classes(found, [str(label) for label in range(1000)])
    for score in scores:
        row = dense[score.label].copy()
        assert (score.num_samples, score.num_correct_top1) == (row.sum(), row[score.label])
        row[score.label] = 0
        assert score.taken_for == (str(row.argmax()) if row.max() else "") and score.num_taken_for == row.max()


def test_confusion_wants_a_png(tmp_path):
    with pytest.raises(RunError, match=r"ends in .png"):
        confusion.check_name(tmp_path / "confusion.svg")


@pytest.fixture(scope="module")
def run_and_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make_data_set(folder / "data", encoding="png", channels=1, size=(32, 32), train=64, val=33, shard_size=40)
    return make_run(folder / "run", digits_config(), steps=3), folder / "data"


def test_command_prints_table_image_and_json(run_and_data, tmp_path, monkeypatch, capsys):
    run, data = run_and_data
    words = ["trainer", "evaluate", "--run", str(run), "--data", str(data), "--views", "ten", "--device", "cpu"]
    image = tmp_path / "confusion.png"
    monkeypatch.setattr("sys.argv", [*words, "--per-class", "--confusion", str(image)])
    assert main() == 0
    text = capsys.readouterr().out
    assert " of 33), ten, loss " in text
    assert "10 classes, the worst first" in text
    assert Image.open(image).format == "PNG"
    monkeypatch.setattr("sys.argv", [*words, "--json"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(count for _, _, count in found["confusion"]) == 33
    assert sum(row["num_samples"] for row in found["per_class"]) == 33
    assert sum(row["num_correct_top1"] for row in found["per_class"]) == found["num_correct_top1"]
    assert f"({found['num_correct_top1']} of 33)" in text


def test_replicas_share_the_batches_of_a_split(run_and_data):
    """Every image once, in order; also where there are more replicas than batches."""
    _, data = run_and_data

    def shared(parts):
        shares = (BatchShare(part, parts) for part in range(parts))
        return [EvaluationLoader(data, digits_config().data, batch_size=4, share=share) for share in shares]

    loaders = shared(2)
    keys = [[key for batch in loader for key in batch.keys] for loader in loaders]
    whole = EvaluationLoader(data, digits_config().data, batch_size=4)
    assert [key for part in keys for key in part] == [key for batch in whole for key in batch.keys]
    for parts in (1, 2, 3, 12):
        counts = [loader.num_batches for loader in shared(parts)]
        assert max(counts) == shared(parts)[0].most_batches == -(-9 // parts)
        assert sum(counts) == 9 and min(counts) == 9 // parts


def test_a_checkpoint_that_is_removed_before_it_is_loaded(run_and_data, tmp_path, monkeypatch):
    """The training that goes on has a newer one by then; of a file that is missing in what stays, it is said."""
    run = shutil.copytree(run_and_data[0], tmp_path / "run")
    (folder,) = checkpoint.checkpoints(run)
    away = tmp_path / "away"
    shutil.copytree(folder, away)
    make_net = evaluate_module.make_net

    def removed(*arguments, **more):
        if away.exists():
            shutil.rmtree(folder)
            shutil.copytree(away, checkpoint.folder_of(run, 1))
            record = json.loads((away / checkpoint.RECORD).read_text())
            (checkpoint.folder_of(run, 1) / checkpoint.RECORD).write_text(json.dumps(record | {"step": 1}))
            shutil.rmtree(away)
        return make_net(*arguments, **more)

    monkeypatch.setattr(evaluate_module, "make_net", removed)
    assert load_network(run).step == 1
    monkeypatch.setattr(evaluate_module, "choose", lambda *_: checkpoint.Choice(folder, checkpoint.choose(run).record))
    folder.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_network(run)


def test_ten_views_of_a_run_by_hand(run_and_data):
    """A probability is off by its share of what its logit is off by, in fp32.

    Logits up to 10, eight layers, sums of up to 288 products, a random walk: 10 x 8 sqrt(288) 2^-24 = 8e-5.
    """
    run, data = run_and_data
    loaded = load_network(run)
    net, config = loaded.net, loaded.config
    found = evaluate_run(run, data, views="ten")
    loader = EvaluationLoader(data, config.data, batch_size=1, views="ten")
    with torch.no_grad():
        shares = [functional.softmax(net(batch.images[0]), dim=1).mean(0) for batch in loader]
    np.testing.assert_allclose(found.confidence, torch.stack(shares).max(1).values, rtol=1e-4)
