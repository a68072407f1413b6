"""Workers of the one-weird-trick layout on a GPU that both share (through gloo) equal one process on it."""

import pytest
import torch

from tests.helpers.pair import run_mesh
from tests.helpers.worker_work import gpu_step
from tests.trainer.parallel.test_equality import relative_error
from trainer.parallel.weird_trick import worker_share

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TF32 = 5e-3  # cuDNN's convolutions have 10 bits, and take other ways for another number of rows


def test_two_workers_on_one_gpu_equal_serial() -> None:
    """One step of a net without kinks, dropout on: loss and every gradient."""
    serial = gpu_step(None, "cuda:0")
    for rank, found in enumerate(run_mesh(gpu_step, "cuda:0", replicas=1)):
        assert found["losses"] == pytest.approx(serial["losses"], rel=TF32)
        for name, tensor in worker_share(serial["gradients"], "ab"[rank]).items():
            assert relative_error(found["gradients"][name], tensor) < TF32, f"{name}, rank {rank}"
