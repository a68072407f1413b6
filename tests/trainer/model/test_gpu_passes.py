"""How often a step on a GPU passes over memory, by count, for the paper's net in one process."""

import pytest

from trainer.config import Config

pytest.importorskip("triton", reason="comes with torch's CUDA wheels")
BATCH = 1024


def test_a_step_passes_over_maps_in_its_kernels_only() -> None:
    """No bias, no copy, no joined towers, no gradient of a bias by a pass of its own; nothing but what is counted here.

    A bound on the bytes: whoever adds a pass over a convolution's output adds 0.17 MB an image at least (conv5's).
    """
    from tests.helpers.gpu_passes import count_step

    model = Config().model
    found = [moved for moved in count_step(model, BATCH) if not moved.is_product]
    kernels = [moved.name for moved in found if moved.name.endswith("_kernel")]
    for name, count in {"norm_forward": 2, "norm_backward": 2, "pool_forward": 3, "pool_backward": 1}.items():
        assert kernels.count(f"{name}_kernel") == count
    assert kernels.count("relu_forward_kernel") == kernels.count("relu_backward_kernel") == 2
    of_maps = {channels * towers for channels in model.channels for towers in (1, 2)}
    beside = [
        moved
        for moved in found
        if moved.name not in kernels
        and any(len(s) == 4 and s[0] == BATCH and s[1] in of_maps and s[2] > model.final_side for s in moved.shapes)
    ]
    assert not beside
    assert sum(moved.moved_bytes for moved in found) / BATCH <= 8e6
