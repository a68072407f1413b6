"""What the workers of the one-weird-trick layout do in tests; module-level, so that processes find it by name."""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from tests.helpers.tower_work import CONFIGS, SEED, SMOOTH, CallCounter, a_batch, replica_facts, use_threads
from trainer.config import Config, load_config
from trainer.experiments.one_weird_trick.layouts import Layouts, make_layouts
from trainer.experiments.one_weird_trick.worker import DTYPES, step_of_layout, train
from trainer.model.alexnet import AlexNet
from trainer.parallel.crossing import make_net
from trainer.parallel.mesh import Mesh, MeshCoord
from trainer.parallel.weird_trick import make_worker_net

BATCH_SIZE, UPDATES = 16, 5


def layouts(*values: str) -> Layouts:
    """The digits' two towers, and one tower of the width of both; an odd number of classes, dropout on."""
    return make_layouts(load_config(CONFIGS / "digits.toml", ["model.classes=11", f"train.seed={SEED}", *values]))


def batches(config: Config, updates: int) -> tuple[Tensor, Tensor]:
    """Images and labels of some updates, one behind the other."""
    images, labels = zip(*(a_batch(config, step, BATCH_SIZE) for step in range(updates)), strict=True)
    return torch.cat(images), torch.cat(labels)


def updates(mesh: Mesh | None, dtype: str = "float64", number: int = UPDATES) -> dict[str, Any]:
    """What the experiment's processes do."""
    config = layouts().one_tower
    return train(mesh, config, *batches(config, number), batch_size=BATCH_SIZE, dtype=DTYPES[dtype])


def one_pair(mesh: Mesh) -> Mesh:
    """The pair of this process, which then knows of no other."""
    return dataclasses.replace(mesh, coord=MeshCoord(mesh.coord.rank % 2, 2), replicas=None)


def worker_facts(mesh: Mesh) -> dict[str, Any]:
    """All that the tests of workers look at: two pairs that know nothing of each other, and 2 x 2."""
    use_threads()
    found = {}
    for name, joined in (("two-workers", one_pair(mesh)), ("two-by-two", mesh)):
        with CallCounter() as counter:
            counted = updates(joined, "float32", 1)["sent"]
        found[name] = updates(joined) | {"counted": counted, "calls": counter.calls}
    return found


def facts_of_four(mesh: Mesh) -> dict[str, Any]:
    """What replicas of towers and what workers do, in one start of four processes."""
    return {"replicas": replica_facts(mesh), "workers": worker_facts(mesh)}


def gpu_step(mesh: Mesh | None, device: str) -> dict[str, Any]:
    """Loss and gradients of one step of a net without kinks, in float32, on a device that the workers share."""
    config = layouts(*SMOOTH).one_tower
    images, labels = (tensor.to(device) for tensor in batches(config, 1))
    net: AlexNet = make_worker_net(config, mesh.link, device=device) if mesh else make_net(config, None, device=device)
    loss = step_of_layout(net, config, mesh, device)(images, labels, 0)
    gradients = {name: cast(Tensor, parameter.grad).cpu() for name, parameter in net.named_parameters()}
    return {"losses": [loss], "gradients": gradients}
