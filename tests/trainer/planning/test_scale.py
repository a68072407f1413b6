"""What a step sends on many GPUs: the count by the trainer's own step against closed formulas; the model by hand."""

import dataclasses
import json
import sys

import pytest

from trainer.__main__ import main
from trainer.config import load_config
from trainer.planning.describe import to_dict
from trainer.planning.scale import (
    OPEN_US,
    Prediction,
    Sizes,
    Traffic,
    Wires,
    count_traffic,
    predict,
    scale_table,
)

PARAMETERS = {"a": 32_531_112, "b": 28_434_112}  # counted by hand from the paper's figure 2
CROSSING_BYTES = {"a": 113_152, "b": 121_344}  # an image, forward, sent


@pytest.mark.parametrize(("world", "images"), [(2, 128), (4, 64), (512, 128)])
def test_the_paper_net_sends_what_the_formulas_say(world: int, images: int) -> None:
    """234,496 bytes per image each way between towers, and 4 bytes a parameter between replicas."""
    a, b = count_traffic(load_config(None), world, images)
    both_ways = sum(CROSSING_BYTES.values())
    assert both_ways == 234_496
    for traffic in (a, b):  # what a tower receives in the forward, it gives back as gradients
        assert traffic.crossing_bytes == both_ways * images
        assert traffic.crossing_calls == 7
        assert traffic.sum_bytes == (4 * PARAMETERS[traffic.tower] if world > 2 else 0)
        assert traffic.control_bytes == (24 + 32 if world > 2 else 24)
    assert (a.tower, b.tower) == ("a", "b")
    assert (a.sum_calls > 1) == (world > 2)


def test_the_small_net_too() -> None:
    config = load_config(None, ["model.hidden=[64, 64]", "model.crossings=['fc6', 'fc8']", "model.classes=10"])
    facts = to_dict(config.model)
    a, b = count_traffic(config, 8, 3)
    expected = 3 * (facts["crossing_bytes_a_to_b"] + facts["crossing_bytes_b_to_a"])
    assert a.crossing_bytes == b.crossing_bytes == expected
    assert (a.sum_bytes, b.sum_bytes) == (4 * facts["parameters_a"], 4 * facts["parameters_b"])


def test_the_model_by_hand() -> None:
    """Four replicas, round numbers."""
    config = load_config(None)
    traffic = Traffic("a", crossing_calls=7, crossing_bytes=10**9, sum_calls=2, sum_bytes=4 * 10**9, control_bytes=56)
    wires = Wires(bandwidth_gb_s=6, latency_us=1000, tflops=1, pair_bandwidth_gb_s=100)
    found = predict(config, traffic, wires, replicas=4, images=100)
    conv1, fc8, total = 105_415_200, 4_096_000, 724_406_816
    operations = 6 * ((total - fc8 - conv1) // 2 + fc8) + 4 * conv1 // 2
    assert found.compute_s == pytest.approx(operations * 100 / 1e12)
    assert found.crossing_s == pytest.approx(0.01 + 0.007)
    assert found.sum_s == pytest.approx(1.0 + 2 * 6 * 0.001)  # 1.5 x 4 GB at 6 GB/s
    assert found.control_s == pytest.approx(0.004)
    waited = found.sum_s - found.compute_s * 2 / 3
    assert found.step_s == pytest.approx(found.compute_s + found.crossing_s + waited + found.control_s)
    assert Prediction(3.0, 1.0, 1.0, 0.5).step_s == 4.5  # a sum that the backward hides
    fed = predict(config, traffic, dataclasses.replace(wires, loader_images_s=50), replicas=4, images=100)
    assert fed.load_s == 2.0 and dataclasses.replace(fed, load_s=0.0) == found
    assert fed.step_s == max(2.0, found.step_s) and Prediction(3.0, 1.0, 1.0, 0.5, 7.0).step_s == 7.0
    assert Prediction(3.0, 1.0, 1.0, 0.5).evaluation_step_s == 1.0 + 0.5 + 0.5


def test_an_epoch_by_hand() -> None:
    """Loading takes the same with any number of replicas; what is left to do is divided among them."""
    config = load_config(None)
    wires = Wires(25, 10, 50, 25, loader_images_s=100.0)  # slower than all else
    options = {"images": 128, "wires": wires, "sizes": Sizes(128_000, 12_800)}
    for row in scale_table(config, (2, 16), **options):
        replicas, model = row["gpus"] // 2, row["model"]
        assert model["load_s"] == model["step_s"] == 1.28
        assert model["epoch_s"] == pytest.approx(1280 / replicas)
        assert model["evaluation_s"] == pytest.approx(1.28 * -(-100 // replicas))
        assert model["start_s"] == pytest.approx(128_000 * OPEN_US * 1e-6 / replicas)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and table; a model needs all three numbers."""
    words = ["trainer", "describe", "--config", "configs/digits.toml", "--scale"]
    numbers = ["--bandwidth-gb-s", "25", "--latency-us", "10", "--tflops", "50"]
    monkeypatch.setattr(sys, "argv", [*words, *numbers, "--json"])
    assert main() == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["gpus"] for row in table] == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert all(row["model"]["step_s"] > 0 for row in table)
    monkeypatch.setattr("trainer.planning.scale.WORLDS", (2, 8))
    monkeypatch.setattr(sys, "argv", [*words, *numbers])
    assert main() == 0
    said = capsys.readouterr().out
    assert "MODEL, not measured" in said and "measured with 1.25 million samples" in " ".join(said.split())
    monkeypatch.setattr(sys, "argv", [*words, *numbers[:2]])
    assert main() == 2
    assert "belong together" in capsys.readouterr().err
