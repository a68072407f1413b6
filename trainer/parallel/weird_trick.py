"""Another layout of the same mesh: data-parallel convolutions, model-parallel fully connected layers.

Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014, arXiv 1404.5997. The net is
one tower, all of whose layers see everything. The two processes of a pair are its *workers*; each has

- all convolutions, and half of the pair's rows: the convolutions' gradients are summed over all processes;
- half of the units of each fully connected layer, for all rows of the pair: their gradients stay (with several pairs
  they are summed over the same worker of each).

Where the one becomes the other, at fc6, workers exchange what conv5 made of their rows. This is the paper's scheme (a):
each assembles the rows of all. Its schemes (b) and (c) let the workers' rows take turns, so that one's travel while
another's are computed, and less memory is held. With two workers (a) has most of that, too: fc6 is computed for this
worker's own rows while the other's travel; and one product a layer for all rows makes one update a batch, as one
process makes it.

fc7 and fc8 need the units of both workers: halves of units cross as between towers, see
:mod:`trainer.parallel.crossing`. The paper's net ends in logistic units, which need nothing of each other. Here it is
softmax, as in the net that it is compared with: workers exchange two numbers an image, the log of the sum of
exponentials and the label's logit.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import TOWERS, Config, ModelConfig
from trainer.model.alexnet import AlexNet
from trainer.model.kernels.interface import Drop
from trainer.model.layers import Dropout, DropoutDraws, Linear, WholeNetLayers, words_of
from trainer.parallel.crossing import crossing_linear, lowered_parameters
from trainer.parallel.data_parallel import GradientSum
from trainer.parallel.link import Link
from trainer.parallel.mesh import Mesh, MeshCoord, Replicas

WORKERS = len(TOWERS)  # of a pair; worker a has the first rows and the first units


class _SeeAllRows(torch.autograd.Function):
    """A fully connected layer with some of the units, over rows of which this worker has half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, link: Link, layer: str) -> Tensor:
        transfer = link.exchange(layer, "forward", x)
        local = x.to(weight.dtype)
        y_local = nn.functional.linear(local, weight, bias)
        remote = link.wait(transfer).to(weight.dtype)
        ctx.save_for_backward(local, remote, weight)
        ctx.link, ctx.layer, ctx.dtype = link, layer, x.dtype
        return torch.cat(_worker_order(link, y_local, nn.functional.linear(remote, weight, bias)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), link = grads, ctx.link
        local, remote, weight = ctx.saved_tensors
        y_local, y_remote = _worker_order(link, *grad.chunk(WORKERS))
        transfer = link.exchange(ctx.layer, "backward", y_remote.mm(weight).to(ctx.dtype))  # the other waits for it
        grad_local = y_local.mm(weight).to(ctx.dtype)
        grad_weight = y_local.t().mm(local).addmm_(y_remote.t(), remote)
        grad_local.add_(link.wait(transfer))  # through the units that the other worker has
        return grad_local, grad_weight, grad.sum(0), None, None


def _worker_order(link: Link, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Worker a's and b's part out of the local and the remote one, or these out of those."""
    return (first, second) if link.tower == "a" else (second, first)


class AllRowsLinear(Linear):
    """fc6: from half of the rows and all inputs to all rows and half of the units."""

    def __init__(self, link: Link, layer: str, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self._link, self._layer = link, layer

    def forward(self, x: Tensor) -> Tensor:
        """This worker's rows (N / 2, inputs) -> all rows of the pair (N, outputs), worker a's first."""
        return _SeeAllRows.apply(x, *lowered_parameters(self, x), self._link, self._layer)


class HalfDropout(Dropout):
    """Dropout of the units of one worker: its columns of the mask that one process would draw."""

    def __init__(self, config: ModelConfig, layer: str, worker: str) -> None:
        super().__init__(config, layer, ("a",), config.activation)
        self._place = TOWERS.index(worker)

    def mask(self, x: Tensor, draws: DropoutDraws) -> Tensor:
        """0/1 mask (N, units of this worker)."""
        whole = x.new_empty(()).expand(len(x), WORKERS * x.shape[1])
        return super().mask(whole, draws).chunk(WORKERS, dim=1)[self._place]

    def drop(self, x: Tensor, draws: DropoutDraws) -> Drop:
        """See :class:`trainer.model.layers.Dropout`."""
        units = x.shape[1]
        words, skipped = words_of(WORKERS * units), self._place * units
        return dataclasses.replace(super().drop(x, draws), words=words, skipped=skipped)


class WorkerLayers:
    """The layers of one worker: see :class:`trainer.model.alexnet.Layers`.

    Args:
        config: the net's shape: one tower.
        link: to the other worker of the pair.
    """

    towers = ("a",)

    def __init__(self, config: ModelConfig, link: Link) -> None:
        assert config.towers == 1 and not any(units % WORKERS for units in config.hidden), config
        self._link, self._whole = link, WholeNetLayers(config)

    def conv(self, layer: str, inputs: int, outputs: int, *, image: bool = False) -> nn.Module:
        """All of a convolution."""
        return self._whole.conv(layer, inputs, outputs, image=image)

    def linear(self, layer: str, inputs: int, outputs: int) -> nn.Module:
        """Half of the units; of an odd number worker a has one more."""
        units = len(torch.arange(outputs).chunk(WORKERS)[TOWERS.index(self._link.tower)])
        if layer == "fc6":
            return AllRowsLinear(self._link, layer, inputs, units)
        return crossing_linear(self._link, layer, inputs, units)


class WorkerNet(AlexNet):
    """What one worker has of a net of one tower, with the weights that one process begins with.

    Args:
        config: the net's shape: one tower, an even number of units in fc6 and fc7.
        link: to the other worker of the pair.
        seed: of the initial weights.
    """

    def __init__(self, config: ModelConfig, link: Link, *, seed: int = 0) -> None:
        super().__init__(config, WorkerLayers(config, link), seed=seed)
        self.drop6, self.drop7 = (HalfDropout(config, layer, link.tower) for layer in ("fc6", "fc7"))
        self._link = link
        self.load_state_dict(worker_share(AlexNet(config, seed=seed).state_dict(), link.tower))

    def loss(self, x: Tensor, labels: Tensor, draws: DropoutDraws | None = None) -> Tensor:
        """Mean cross entropy of all rows of the pair, nats, a scalar, the same in both workers.

        Args:
            x: images of this worker's rows (N / 2, C, S, S).
            labels: of all rows of the pair (N,) int64, worker a's first.
            draws: ``first`` is the pair's first row.
        """
        logits = self(x, draws)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        share = torch.arange(self.config.classes, device=labels.device).chunk(WORKERS)[TOWERS.index(self._link.tower)]
        columns, width = labels - share[0], len(share)
        here = (columns >= 0) & (columns < width)
        picked = logits.gather(1, columns.clamp(0, width - 1)[:, None])[:, 0] * here
        sums = logits.logsumexp(dim=1)
        theirs = self._link.wait(self._link.exchange("loss", "forward", torch.stack((sums, picked), 1).detach()))
        # The gradient of this worker's logits needs no message: d loss / d sums is its share of all exponentials.
        return (torch.logaddexp(sums, theirs[:, 0]) - picked - theirs[:, 1]).mean()


def worker_share(whole: Mapping[str, Tensor], worker: str) -> dict[str, Tensor]:
    """A worker's part of the weights, gradients or velocities of the whole net: views.

    Args:
        whole: keyed by the net's names.
        worker: ``a`` or ``b``.
    """
    place = TOWERS.index(worker)
    return {name: tensor.chunk(WORKERS)[place] if name.startswith("fc") else tensor for name, tensor in whole.items()}


class AllProcesses(Replicas):
    """All processes of the mesh: over them the convolutions' gradients are summed."""

    summed = "conv1 to conv5"

    def __init__(self, mesh: Mesh) -> None:
        group = mesh.link.group if mesh.coord.replicas == 1 else dist.group.WORLD
        assert group is not None
        super().__init__(mesh.coord, group, mesh.control, mesh.failures, mesh.link.ledger)
        self._way, self._who, self._ranks = "all", "a worker", list(range(mesh.coord.world))


class WorkerStep:
    """Forward and backward of a step: what :class:`trainer.training.step.ForwardBackward` is for towers.

    Args:
        net: this worker's.
        mesh: the other processes.
        seed: of dropout.
    """

    def __init__(self, net: WorkerNet, mesh: Mesh, *, seed: int) -> None:
        self._net, self._coord, self._seed = net, mesh.coord, seed
        named = list(net.named_parameters())
        self._sums = [GradientSum([p for name, p in named if not name.startswith("fc")], AllProcesses(mesh))]
        if mesh.replicas:
            self._sums.append(GradientSum([p for name, p in named if name.startswith("fc")], mesh.replicas))

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> float:
        """Sets the gradient of every parameter here to that of the mean loss over the whole batch.

        Args:
            images: this worker's rows of the batch (:func:`worker_rows`), (N / 2, C, S, S).
            labels: of all rows of its pair (:func:`pair_rows`), (N,) int64.
            step: step of the run, from 0; decides the dropout masks.

        Returns:
            Mean loss of the pair's rows.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        self._net.zero_grad(set_to_none=True)
        for each in self._sums:
            each.prepare_for_backward()
        draws = DropoutDraws(self._seed, step, first=self._coord.replica * len(labels))
        loss = self._net.loss(images, labels, draws)
        (loss / self._coord.replicas).backward()
        for each in self._sums:
            each.finish()
        return float(loss.detach())


def pair_rows(coord: MeshCoord, batch_size: int) -> slice:
    """The rows of a whole batch that a pair has."""
    size = batch_size // coord.replicas
    return slice(coord.replica * size, (coord.replica + 1) * size)


def worker_rows(coord: MeshCoord, batch_size: int) -> slice:
    """The rows of a whole batch that a worker has; the batch can be divided by the number of processes."""
    size = batch_size // coord.world
    return slice(coord.rank * size, (coord.rank + 1) * size)


def make_worker_net(config: Config, link: Link, *, device: str = "cpu") -> WorkerNet:
    """A worker's net as it is trained: channels_last, in training mode.

    Args:
        config: the recipe, of one tower without batch normalization, whose statistics are those of a whole batch.
        link: to the other worker of the pair.
        device: ``cpu`` or ``cuda:N``.
    """
    net = WorkerNet(config.model, link, seed=config.train.seed)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
