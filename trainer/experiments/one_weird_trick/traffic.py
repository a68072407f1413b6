"""What a process sends in a step, layer by layer, for any batch: counted by the ledger, and by formula.

The count: a process runs the layout's own step on torch's fake process group, where everything is sent to nobody, with
two small batches; from the two ledgers follows what every step costs and what every image costs. Nothing else is
possible, for each message is as long as its rows are many, or as its weights. The formula is of the recipe's shapes
alone. Tests hold both against the ledger of real processes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from trainer.config import Config, ModelConfig
from trainer.parallel.crossing import make_net
from trainer.parallel.link import LedgerRow
from trainer.parallel.mesh import Mesh, MeshCoord, Replicas
from trainer.parallel.weird_trick import WORKERS, AllProcesses, WorkerStep, make_worker_net, worker_rows
from trainer.planning.describe import BYTES, count_crossings, count_layers
from trainer.planning.scale import fake_world
from trainer.training.step import ForwardBackward

BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
GRADIENTS, CONVOLUTIONS = Replicas.summed, AllProcesses.summed  # sums over replicas, and over all processes
OUTWARDS = ("a->b", "a->a", "all")  # from the first process; the others send as much


@dataclasses.dataclass(frozen=True)
class Sent:
    """What one process sends at one place, forward and backward.

    Attributes:
        name: the layer whose input crosses, or what the message is.
        step_bytes: of a step, whatever the batch, as the ledger has them: of a sum those that take part in it.
        image_bytes: of an image of the whole batch.
        summed_by: processes that take part in a sum; 0 for messages.
    """

    name: str
    step_bytes: int
    image_bytes: int
    summed_by: int = 0

    def in_ledger(self, size: int) -> int:
        """Bytes in the ledger of a step of ``size`` images."""
        return self.step_bytes + self.image_bytes * size

    def leaving(self, size: int) -> float:
        """Bytes that leave a process in such a step; of a sum by P processes 2 (P - 1) / P of it, as in a ring."""
        share = 2 * (self.summed_by - 1) / self.summed_by if self.summed_by else 1
        return share * self.in_ledger(size)


def total_bytes(sent: Sequence[Sent], batch_size: int) -> float:
    """Bytes that leave a process in a step."""
    return sum(each.leaving(batch_size) for each in sent)


def crossover(towers: Sequence[Sent], workers: Sequence[Sent]) -> float | None:
    """The batch from which the workers send less than the towers; None where they never do."""
    per_image = total_bytes(towers, 1) - total_bytes(towers, 0) - total_bytes(workers, 1) + total_bytes(workers, 0)
    fixed = total_bytes(workers, 0) - total_bytes(towers, 0)
    return max(0.0, fixed / per_image) if per_image > 0 else None


def sent_by_layer(rows: Sequence[LedgerRow]) -> dict[str, int]:
    """Bytes that the first process sends, out of its ledger; without the control messages of a run."""
    found: dict[str, int] = {}
    for row in rows:
        if row.kind != "control" and row.direction in OUTWARDS:
            found[row.name] = found.get(row.name, 0) + row.num_bytes
    return found


def count_towers(config: Config, world: int) -> list[Sent]:
    """Two towers, ``world / 2`` replicas of them."""

    def run(mesh: Mesh, images: torch.Tensor, labels: torch.Tensor) -> None:
        rows = slice(len(images) // mesh.coord.replicas)
        ForwardBackward(make_net(config, mesh.link), config.train, mesh=mesh)(images[rows], labels[rows], 0)

    return _count(config, world, run)


def count_workers(config: Config, world: int) -> list[Sent]:
    """Workers of the net of one tower, in ``world / 2`` pairs."""

    def run(mesh: Mesh, images: torch.Tensor, labels: torch.Tensor) -> None:
        step = WorkerStep(make_worker_net(config, mesh.link), mesh, seed=0)
        step(images[worker_rows(mesh.coord, len(images))], labels[: len(images) // mesh.coord.replicas], 0)

    return _count(config, world, run)


def _count(config: Config, world: int, run: Callable[[Mesh, torch.Tensor, torch.Tensor], None]) -> list[Sent]:
    """Two batches, one image a process and two."""
    shape = (config.model.in_channels, config.model.image_px, config.model.image_px)
    ledgers = []
    for size in (world, 2 * world):
        with fake_world(MeshCoord(0, world)) as mesh:
            run(mesh, torch.zeros(size, *shape), torch.zeros(size, dtype=torch.int64))
            ledgers.append(sent_by_layer(mesh.link.ledger.rows()))
    first, second = ledgers
    found = []
    for name, num_bytes in first.items():
        image_bytes, rest = divmod(second[name] - num_bytes, world)
        assert rest == 0, (name, ledgers)
        summed_by = {GRADIENTS: world // WORKERS, CONVOLUTIONS: world}.get(name, 0)
        found.append(Sent(name, num_bytes - image_bytes * world, image_bytes, summed_by))
    return found


def towers_formula(model: ModelConfig, world: int) -> list[Sent]:
    """Of two towers: each sends its half of a crossing forward, and the gradient of the other's half backward."""
    replicas = world // WORKERS
    found = [Sent(c.layer, 0, (c.bytes_a_to_b + c.bytes_b_to_a) // replicas) for c in count_crossings(model)]
    parameters = sum(row.parameters_a for row in count_layers(model))
    return found + ([Sent(GRADIENTS, BYTES * parameters, 0, replicas)] if replicas > 1 else [])


def workers_formula(model: ModelConfig, world: int) -> list[Sent]:
    """Of workers of one tower. With R pairs, an image of the whole batch costs 1 / R of one of the pair's.

    - fc6: a worker's rows, half of the pair's, to the other; backward the gradient of the other's rows;
    - fc7, fc8: half of the units of all rows of the pair; backward as many;
    - loss: two numbers an image, forward only;
    - all weights and biases of the convolutions; and, with several pairs, this worker's of the fully connected layers.
    """
    replicas, layers = world // WORKERS, {row.layer: row for row in count_layers(model)}
    flat = model.channels[4] * model.final_side**2
    halves = {"fc6": 2 * flat // 2, "fc7": 2 * model.hidden[0] // 2, "fc8": 2 * model.hidden[1] // 2, "loss": 2}
    found = [Sent(name, 0, BYTES * numbers // replicas) for name, numbers in halves.items()]
    if replicas > 1:
        units = {"fc6": model.hidden[0], "fc7": model.hidden[1], "fc8": model.classes}
        own = sum(layers[layer].parameters_a // n * -(-n // WORKERS) for layer, n in units.items())
        found.append(Sent(GRADIENTS, BYTES * own, 0, replicas))
    convolutions = sum(row.parameters_a for row in layers.values() if row.layer.startswith("conv"))
    return [*found, Sent(CONVOLUTIONS, BYTES * convolutions, 0, world)]
