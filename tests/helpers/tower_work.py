"""What the two towers do in the tests of this folder; module-level, so that both processes find it by name."""

import collections
import dataclasses
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.loader.batch import BatchShare
from tests.helpers.side_by_side import SideBySide
from trainer.config import TOWERS, Config, load_config
from trainer.errors import PeerError
from trainer.model.alexnet import AlexNet
from trainer.model.layers import DropoutDraws
from trainer.parallel import crossing
from trainer.parallel.link import COMM_DTYPES, Link, Transfer
from trainer.parallel.mesh import Mesh, MeshCoord
from trainer.parallel.status import GlobalStatus, LocalStatus, PendingStatus, exchange_status
from trainer.training.optimizer import PaperSGD
from trainer.training.step import ForwardBackward

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEED = 5
# The digits' net without kinks, neither of ReLU nor of pooling: here a small rounding has small consequences, always.
SMOOTH = (
    "model.activation=tanh",
    'model.post_ops=[["tanh", "lrn"], ["tanh", "lrn"], ["tanh"], ["tanh"], ["tanh"]]',
    "model.strides=[2, 2, 1, 1, 1]",  # maps of 14 and 7 px
)


def recipe(name: str) -> Config:
    """A recipe of the project with livelier weights, so that gradients are far from zero everywhere; or ``smooth``."""
    if name == "smooth":
        return load_config(CONFIGS / "digits.toml", SMOOTH)
    std = "model.init_std=[0.02, 0.03, 0.03, 0.03, 0.03, 0.012, 0.018, 0.02]"
    return load_config(CONFIGS / f"{name}.toml", [std, "train.precision=fp32"] if name == "paper" else [])


def a_batch(config: Config, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, S, S) on the scale of mean-subtracted pixels, labels (N,)."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (size, config.model.in_channels, config.model.image_px, config.model.image_px)
    images = torch.randn(shape, generator=generator) * (1.0 if config.data.normalize == "per_channel" else 60.0)
    labels = torch.randint(config.model.classes, (size,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


class CallCounter(TorchDispatchMode):
    """Sees every c10d call below the project's own code: name, peers, bytes. Knows nothing of the ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[tuple[str, int]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            name = func._schema.name.split("::")[1]
            self.calls[name, sum(t.nbytes for t in tensors if isinstance(t, Tensor))] += 1
        return func(*args, **(kwargs or {}))


def make_net(config: Config, link: Link | None) -> AlexNet:
    """One tower of two, or the whole net (without a link), as in training."""
    return crossing.make_net(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=SEED)), link)


def by_tower(net: AlexNet, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Copies of tensors by names of the state dict, cut by tower: ``{tower.name: tensor}``."""
    parts = net.split_towers({name: tensor for name, tensor in tensors.items() if tensor is not None})
    return {f"{tower}.{name}": part.detach().clone() for tower, named in parts.items() for name, part in named.items()}


def gradients_of(net: AlexNet) -> dict[str, Tensor]:
    """Every gradient, by tower."""
    return by_tower(net, {name: parameter.grad for name, parameter in net.named_parameters()})


def weights_of(net: AlexNet) -> dict[str, Tensor]:
    """Every weight, by tower."""
    return by_tower(net, dict(net.named_parameters()))


def use_threads() -> None:
    """One thread, quicker for nets this small on a busy machine; or as many as the environment says."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def train_steps(
    net: AlexNet, config: Config, batch_size: int, steps: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Loss and gradients of the first step, weights after the last; ``{tower.layer: tensor}``."""
    net = net.to(dtype)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    record: dict[str, Any] = {"losses": []}
    for step in range(steps):
        images, labels = a_batch(config, step, batch_size)
        optimizer.zero_grad()
        loss = net.loss(images.to(dtype), labels, DropoutDraws(SEED, step))
        loss.backward()
        record["losses"].append(loss.item())
        if step == 0:
            record["gradients"] = gradients_of(net)
        optimizer.step()
    return record | {"weights": weights_of(net)}


def train_tower(link: Link | None, name: str, *how: Any) -> dict[str, Any]:
    """:func:`train_steps` on one tower of two, or with both here."""
    use_threads()
    config = recipe(name)
    return train_steps(make_net(config, link), config, *how)


def train_rows(
    mesh: Mesh | None, name: str, batch_size: int, steps: int, accumulate: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """:func:`train_steps` with the trainer's own step, on this replica's rows of the same batches."""
    use_threads()
    config = recipe(name)
    train = dataclasses.replace(config.train, batch_size=batch_size, accumulate=accumulate, seed=SEED)
    coord = mesh.coord if mesh else MeshCoord(0, 2)
    net = make_net(config, mesh.link if mesh else None).to(dtype)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    gradients = ForwardBackward(net, train, mesh=mesh)
    rows = BatchShare(coord.replica, coord.replicas).rows(batch_size)
    record: dict[str, Any] = {"losses": []}
    for step in range(steps):
        images, labels = a_batch(config, step, batch_size)
        loss = gradients(images[rows].to(dtype), labels[rows], step)
        norms = dict.fromkeys(net.towers, 1.0)
        record["losses"].append(compare_notes(mesh, LocalStatus(1, 1, False, 0), norms, float(loss), "a test").loss)
        if step == 0:
            record["gradients"] = gradients_of(net)
        optimizer.step()
    velocities = {name: optimizer.velocity(parameter) for name, parameter in net.named_parameters()}
    return record | {"weights": weights_of(net), "velocities": by_tower(net, velocities)}


def count_replica_step(mesh: Mesh, name: str, batch_size: int, accumulate: int) -> dict[str, Any]:
    """Every c10d call of one training step of a replica, as the dispatcher sees it, and the ledger beside it."""
    config = recipe(name)
    train = dataclasses.replace(config.train, batch_size=batch_size, accumulate=accumulate)
    net = make_net(config, mesh.link)
    gradients = ForwardBackward(net, train, mesh=mesh)
    images, labels = a_batch(config, 0, batch_size)
    rows = BatchShare(mesh.coord.replica, mesh.coord.replicas).rows(batch_size)
    mesh.link.ledger.clear()
    with CallCounter() as counter:
        gradients(images[rows], labels[rows], 0)
    ledger = [row.to_dict() for row in mesh.link.ledger.rows()]
    return {"calls": counter.calls, "ledger": ledger, "parameters": sum(p.numel() for p in net.parameters())}


def compare_notes(
    mesh: Mesh | None, notes: LocalStatus, norms: Mapping[str, float], loss: float, where: str, *, finite: bool = True
) -> GlobalStatus:
    """What all processes know after the control messages of a step."""
    figures = {tower: torch.tensor(norm, dtype=torch.float64) for tower, norm in norms.items()}
    mean = torch.tensor(loss, dtype=torch.float64)
    told, sound = exchange_status(mesh, torch.tensor(notes.words), torch.tensor(finite), figures, mean)
    verdict = PendingStatus(mesh, tuple(norms), told, where).read()
    assert bool(sound) == verdict.finite  # what the device knows, the host knows
    return verdict


def disagree(mesh: Mesh, what: str) -> str:
    """The last rank (of the batch: the last replica) tells something else than the others; what each is told."""
    odd = mesh.coord.replica == mesh.coord.replicas - 1 and (mesh.coord.tower == "b" or what == "batch")
    notes = LocalStatus(
        fingerprint=2 if odd and what == "rows" else 1,
        order_fingerprint=2 if odd and what == "batch" else 1,
        stop=odd and what == "stop",
        plateaus=3 if odd and what == "plateaus" else 1,
    )
    norms = {mesh.coord.tower: 2.0 if odd and what == "gradients" else 1.0}
    finite = not (odd and what == "finite")
    try:
        verdict = compare_notes(mesh, notes, norms, float(mesh.coord.replica), "step 7", finite=finite)
    except PeerError as error:
        return str(error)
    return f"finite {verdict.finite}, stop {verdict.stop}, plateaus {verdict.plateaus}"


def replica_facts(mesh: Mesh) -> dict[str, Any]:
    """All that the tests of replicas look at, in one start of four processes."""
    cases = ("finite", "stop", "plateaus", "gradients", "batch")
    return {
        "trained": {pieces: train_rows(mesh, "digits", 16, 5, pieces) for pieces in (1, 2)},
        "smooth": train_rows(mesh, "smooth", 16, 1, 1, torch.float32),
        "counted": {pieces: count_replica_step(mesh, "digits", 8, pieces) for pieces in (1, 2)},
        "told": {what: disagree(mesh, what) for what in cases},
    }


def count_one_step(link: Link, name: str, batch_size: int) -> dict[str, Any]:
    """Every c10d call of one training step, as the dispatcher sees it, and the ledger beside it."""
    config = recipe(name)
    net = make_net(config, link)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    images, labels = a_batch(config, 0, batch_size)
    link.ledger.clear()
    with CallCounter() as forward:
        loss = net.loss(images, labels, DropoutDraws(SEED, 0))
    with CallCounter() as backward:
        loss.backward()
    with CallCounter() as rest:
        link.control([1, 2, 3])
        optimizer.step()
    ledger = [row.to_dict() for row in link.ledger.rows()]
    return {"forward": forward.calls, "backward": backward.calls, "rest": rest.calls, "ledger": ledger}


PRODUCTS = ("convolution", "convolution_backward", "addmm", "addmm_", "mm")


class EventLog(TorchDispatchMode):
    """Messages, matrix products and convolutions in their order, as the dispatcher sees them; the link's waits between.

    Attributes:
        events: ``send 512``, ``recv_ 512`` (bytes), ``wait conv3 forward``, names of operations.
    """

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.events: list[str] = []
        inner = link.wait

        def wait(transfer: Transfer) -> Tensor:
            self.events.append(f"wait {transfer.name}")
            return inner(transfer)

        link.wait = wait  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d":
            self.events.append(f"{name} {args[0][0].nbytes}")
        elif name in PRODUCTS:
            self.events.append(name)
        return func(*args, **(kwargs or {}))


def events_of_one_step(link: Link, batch_size: int) -> tuple[list[str], list[str]]:
    """Of the digits' net: forward, backward."""
    config = recipe("digits")
    net = make_net(config, link)
    images, labels = a_batch(config, 0, batch_size)
    with EventLog(link) as forward:
        loss = net.loss(images, labels, DropoutDraws(SEED, 0))
    del link.wait  # the class's own again
    with EventLog(link) as backward:
        loss.backward()
    del link.wait
    return forward.events, backward.events


def first_gradients(link: Link | None, overrides: Sequence[str], batch_size: int) -> dict[str, Any]:
    """Loss and gradients of one step of the digits' net: one tower of two, or the reference with both side by side.

    In float64, which no wire is as wide as; only bfloat16 products need fp32 around them.
    """
    use_threads()
    config = load_config(CONFIGS / "digits.toml", [*overrides, f"train.batch_size={batch_size}"])
    dtype = torch.float32 if config.train.precision == "bf16" else torch.float64
    net = make_net(config, link).to(dtype)
    mesh = None
    if link:
        coord = MeshCoord(TOWERS.index(link.tower), 2)
        mesh = cast(Mesh, types.SimpleNamespace(coord=coord, replicas=None))
    reference = None if link else SideBySide(net, COMM_DTYPES[config.train.comm_dtype])
    images, labels = a_batch(config, 0, batch_size)
    loss = ForwardBackward(cast(AlexNet, reference or net), config.train, mesh=mesh)(images.to(dtype), labels, 0)
    return {"loss": float(loss)} | (reference.by_tower(gradients=True) if reference else gradients_of(net))


def overlap_facts(link: Link, variants: Sequence[Sequence[str]], batch_size: int) -> dict[str, Any]:
    """All that the tests of overlapped crossings look at, in one start of two processes."""
    return {
        "events": events_of_one_step(link, batch_size),
        "gradients": [first_gradients(link, overrides, batch_size) for overrides in variants],
    }
