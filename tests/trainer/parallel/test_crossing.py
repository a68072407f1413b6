"""Half by half is the whole: sums and every gradient; and a peer that is lost meanwhile is named with its crossing."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.helpers import tower_work as work
from trainer.errors import PeerError
from trainer.model.layers import Conv2d, DropoutDraws, Linear
from trainer.parallel.crossing import _Halves
from trainer.parallel.mesh import MeshCoord
from trainer.planning.scale import fake_world

pytestmark = pytest.mark.numeric

CASES = (
    (Linear(8, 5), (3, 8)),
    (Conv2d(6, 4, 3, 1, (1, 1)), (2, 6, 7, 7)),
    (Conv2d(6, 4, 3, 2, (0, 3)), (2, 6, 9, 8)),
    (Conv2d(6, 4, 5, 3, (2, 1)), (2, 6, 9, 9)),
)


def whole(module: Conv2d | Linear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What autograd sees: the layer on both halves at once."""
    if isinstance(module, Linear):
        return functional.linear(x, weight, bias)
    return functional.conv2d(functional.pad(x, module.zeros * 2), weight, bias, module.stride)


@pytest.mark.parametrize("tower", ["a", "b"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("module", "shape"), CASES)
def test_halves_equal_the_whole(module: Any, shape: Any, layout: torch.memory_format, tower: str) -> None:
    """float64, against autograd on the joined halves; tower a's half stands first, whoever looks."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, module.weight.shape, module.bias.shape)
    numbers = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    x, weight, bias = (t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in numbers)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    expected = whole(module, x, weight, bias)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(grad)
    with fake_world(MeshCoord("ab".index(tower), 2)) as mesh, torch.no_grad():
        halves, found = _Halves(mesh.link, "fc6", module, None), torch.full_like(weight, torch.nan)
        (local, remote), (w_local, w_remote) = halves.split(x), halves.split(weight)
        first = local[:, 0] if tower == "a" else remote[:, 0]
        assert torch.equal(first, x[:, 0])
        y = halves.product(local, w_local, bias)
        halves.add_product(y, remote, w_remote)
        torch.testing.assert_close(y, expected)
        grad_x = torch.empty_like(x)
        for part, half, columns in zip(halves.split(grad_x), (local, remote), (w_local, w_remote), strict=True):
            part.copy_(halves.grad_input(grad, half, columns))
        torch.testing.assert_close(grad_x, x.grad)
        for half, out in zip((local, remote), halves.split(found), strict=True):
            halves.grad_weight(grad, half, out)
        torch.testing.assert_close(found, weight.grad)


class Broken:
    """A message to a peer that is gone."""

    def wait(self) -> None:
        raise RuntimeError("Connection closed by peer\nand a trace")


def test_a_lost_peer_is_named_with_the_crossing_that_was_waited_for() -> None:
    """Not with the one that was started last."""
    half = torch.zeros(2, 3)
    with fake_world(MeshCoord(0, 2)) as mesh:
        link = mesh.link
        first, second = (link.exchange(layer, "backward", half) for layer in ("fc6", "conv3"))
        first.works = [Broken()]
        with pytest.raises(PeerError, match=r"tower b \(rank 1\) is lost at fc6 backward: Connection closed by peer$"):
            link.wait(first)
        assert link.wait(second).shape == half.shape


def test_a_message_that_nobody_waits_for_is_looked_after_by_the_next() -> None:
    """Tower a sends fc8's gradient and goes on; if it does not arrive, that is what is said."""
    half = torch.zeros(2, 3)
    with fake_world(MeshCoord(0, 2)) as mesh:
        mesh.link.isend("fc8", "backward", half).works = [Broken()]
        with pytest.raises(PeerError, match="is lost at fc8 backward"):
            mesh.link.exchange("fc7", "backward", half)


def test_both_towers_start_the_same_messages_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL matches messages by their order alone: what one tower sends in a call, the other receives in that call."""
    turned = {"isend": "irecv", "irecv": "isend"}
    calls: dict[int, list[dict[str, int]]] = {0: [], 1: []}
    start = dist.batch_isend_irecv
    for rank, found in calls.items():

        def record(operations: list[Any], found: list[dict[str, int]] = found) -> list[Any]:
            found.append({operation.op.__name__: operation.tensor.nbytes for operation in operations})
            return start(operations)

        monkeypatch.setattr(dist, "batch_isend_irecv", record)
        with fake_world(MeshCoord(rank, 2)) as mesh:
            images, labels = work.a_batch(work.recipe("digits"), 0, 4)
            net = work.make_net(work.recipe("digits"), mesh.link)
            net.loss(images, labels, DropoutDraws(work.SEED, 0)).backward()
            assert mesh.link.started == len(found)
    assert calls[0] == [{turned[name]: size for name, size in call.items()} for call in calls[1]]
    assert len(calls[0]) == 8 and [sorted(call) for call in calls[0]].count(["irecv", "isend"]) == 6
