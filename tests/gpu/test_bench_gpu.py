"""``python -m trainer bench`` on a GPU: stages by CUDA events, which must account for the steps they are part of."""

import statistics
from pathlib import Path

import pytest
import torch

from trainer.bench.bottleneck import judge
from trainer.bench.measure import BY_PHASE, BenchSettings, Part, measure
from trainer.bench.record import BenchRecord
from trainer.bench.run import describe_workload, make_record
from trainer.config import load_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits.toml"


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def measured(request, tmp_path_factory) -> tuple[BenchRecord, Part]:
    config = load_config(CONFIG, [f"train.precision='{request.param}'"])
    settings = BenchSettings(seconds=0.5)
    scratch = tmp_path_factory.mktemp("bench")
    part = measure(config, settings, mesh=None, device="cuda:0", scratch=scratch)
    workload = describe_workload(config, settings, recipe="digits.toml", processes=1, device="cuda:0", parts=[part])
    return make_record(config, workload, [part]), part


def test_ceilings_of_the_gpu_are_measured(measured):
    record, _ = measured
    names = {ceiling.name for ceiling in record.ceilings}
    assert {"memory copy", "host to device", "matrix fp32", "matrix tf32", "matrix bf16"} <= names
    assert all(ceiling.figure.median > 0 for ceiling in record.ceilings)


def test_the_stages_of_a_step_fill_it(measured):
    """Of steps that are launched kernel by kernel: as one CUDA graph they take a fraction of the time."""
    record, part = measured
    stages = {stage.name: stage.ms.median for stage in record.stages if stage.group == "net"}
    assert stages["forward"] > 0 and stages["backward"] > 0 and stages["optimizer"] > 0
    assert 0.5 < sum(stages.values()) / 1e3 / statistics.median(part.seconds_per_step(BY_PHASE)) < 1.5
    assert judge(record).side == "net"
