"""What ``tests/gpu/test_nccl_gpu.py`` proves of NCCL on a GPU, over gloo on the CPU: the same bodies."""

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_nccl_gpu import diverged_alike, lost_rank_ends_the_other, resumed_equals_whole, two_ranks_equal
from tests.helpers import two_ranks


def test_overlap_is_of_other_kernels_with_those_of_nccl() -> None:
    events = [
        ("gemm", 0.0, 4.0),
        ("ncclDevKernel_SendRecv", 3.0, 9.0),
        ("conv", 5.0, 6.0),
        ("Memcpy DtoD", 5.0, 6.0),
        ("late", 9.0, 10.0),
    ]
    assert two_ranks.overlapping(events) == ["gemm", "conv"]
    assert two_ranks.overlapping(events[:1] + events[2:]) == []


def test_messages_that_nccl_logs_are_counted(tmp_path: Path) -> None:
    told = (("Send", 1572864, 7), ("Recv", 1572864, 7), ("AllReduce", 1, 7), ("Send", 3, 8))
    lines = [
        f"host:1 [0] NCCL INFO {what}: opCount 1 sendbuff 0x7 recvbuff 0x7 count {count} datatype {kind} op 0 root 1"
        for what, count, kind in told
    ]
    (tmp_path / "nccl-12").write_text("\n".join(lines))
    assert two_ranks.sent_by_nccl(tmp_path, 12) == [4 * 1572864, 24]


@pytest.mark.slow
def test_the_bodies_over_gloo(tmp_path: Path) -> None:
    codes, said = two_ranks.start("facts", "cpu", tmp_path)
    assert codes == [0, 0], said
    facts: list[dict[str, Any]] = two_ranks.results(tmp_path)
    assert [rank["backend"] for rank in facts] == ["gloo", "gloo"]
    two_ranks_equal(facts, two_ranks.train(None, "cpu"))
    resumed_equals_whole(facts)
    diverged_alike(facts)
    assert all(rank["sent"] for rank in facts)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["killed", "hung"])
def test_a_lost_rank_ends_the_other(mode: str, tmp_path: Path) -> None:
    lost_rank_ends_the_other(mode, "cpu", tmp_path)
