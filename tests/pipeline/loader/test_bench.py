"""``python -m pipeline bench``: every stage is measured, bad input is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError, DatasetError
from pipeline.loader.bench import BenchOptions, run_bench
from pipeline.loader.config import LoaderConfig
from tests.helpers.loader_data_set import make_data_set

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("bench"), size=(24, 20))


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_the_command_prints_one_json_object(data: Path) -> None:
    done = bench("--data", str(data), "--json", "--seconds", "0.05", "--repeats", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["stages"]] == ["read", "decode", "whole"]
    assert result["images"] == "24 jpeg 24x20x3" and result["batch_size"] == 24
    for row in result["stages"]:
        assert 0 < row["images_per_s_min"] <= row["images_per_s"] <= row["images_per_s_max"]
        assert row["first_batch_s"] > 0 and row["cores"] > 0 and row["mb_per_s"] > 0
        assert row["cpu_us_per_image"] > 0
    assert result["peak_memory_mb"] > 10


def test_rates_and_megabytes_agree(data: Path) -> None:
    options = BenchOptions(batch_size=6, seconds=0.02, repeats=3, threads=1)
    result = run_bench(data, LoaderConfig(crop_px=8), options)
    total = sum(path.stat().st_size for path in (data / "train").glob("*.tar"))
    for row in result.stages:
        assert row.mb_per_s == pytest.approx(row.images_per_s * total / 24 / 1e6)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, device in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert BenchOptions().resolved().device == device
        assert BenchOptions("cpu").resolved().device == "cpu" and BenchOptions("cuda:1").resolved().device == "cuda:1"


def test_user_errors_are_one_line_and_exit_2(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[data]\ncrop_px = 8\n")  # model.image_px, not a setting of its own
    assert "data.crop_px is no field" in bench("--data", str(data), "--recipe", str(recipe)).stderr
    recipe.write_text("[data]\ncrop_pix = 8\n")
    done = bench("--data", str(data), "--recipe", str(recipe))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: recipe ") and "data.crop_pix" in done.stderr and done.stderr.count("\n") == 1


def test_bad_options_are_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="--repeats"):
        BenchOptions(repeats=0)
    with pytest.raises(ConfigError, match=r"crop_px is 21, but the images are 24x20"):
        run_bench(data, LoaderConfig(crop_px=21), BenchOptions(seconds=0.01, repeats=1))
    with pytest.raises(DatasetError, match="no data set folder"):
        run_bench(data / "nowhere", None, BenchOptions())
