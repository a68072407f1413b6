"""What a training step sends on 2, 4 ... 512 GPUs: counted; and how long it would take: a model.

The count: a process of the mesh runs the trainer's own step, with one image, on torch's fake process group, where
everything is sent to nobody; its ledger is read, and what depends on the images (the crossings, not the gradients) is
multiplied. The model: see :func:`predict_step`.
"""

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from trainer.config import Config
from trainer.model.alexnet import AlexNet
from trainer.parallel.crossing import TowerLayers
from trainer.parallel.link import CONTROL_WORDS
from trainer.parallel.mesh import Mesh, MeshCoord, make_mesh
from trainer.parallel.status import REPLICA_WORDS
from trainer.planning.describe import count_layers
from trainer.training.step import ForwardBackward
from twotower.words import pluralize

WORLDS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
TIMEOUT = datetime.timedelta(seconds=60)
OPEN_US = 1.1  # of a sample whose index a process reads
FORMULA = (
    "MODEL, not measured: step = max(loading, compute + crossing + max(0, sum - 2/3 compute) + control); "
    "crossing = bytes / pair bandwidth + messages x latency; "
    "sum = 2 (R - 1) / R x bytes / bandwidth + sums x 2 (R - 1) x latency; control = R x latency; "
    "the slower tower; loading = images / the loader's rate, the same with any number of replicas, for each reads its "
    "own rows; evaluation = batches / R x (forward + crossing / 2 + control); no checkpoints"
)
MEASURED = (
    f"start-up = samples / R x {OPEN_US:g} us: what a process takes to open its tars, measured with 1.25 million "
    "samples in 626 shards on 2 cores with a warm cache; finding each other and importing come to it"
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one GPU sends in a step, counted.

    Attributes:
        tower: ``a`` or ``b``.
        crossing_calls: messages to the other tower.
        crossing_bytes: their bytes.
        sum_calls: sums over replicas (buckets of gradients); 0 with one pair.
        sum_bytes: bytes of gradients that take part in them. How many of them leave a GPU is the algorithm's affair.
        control_bytes: flags and fingerprints.
    """

    tower: str
    crossing_calls: int
    crossing_bytes: int
    sum_calls: int
    sum_bytes: int
    control_bytes: int


@dataclasses.dataclass(frozen=True)
class Wires:
    """What the model is given.

    Attributes:
        bandwidth_gb_s: between replicas, one way, of one GPU, 1e9 bytes/s.
        latency_us: of one message.
        tflops: what one GPU computes in training, 1e12 operations/s (what it reaches, not what its leaflet says).
        pair_bandwidth_gb_s: between the two towers of a pair, one way.
        loader_images_s: what one process's loader reaches alone (``python -m pipeline bench``), images/s; None: it is
            not in the model.
    """

    bandwidth_gb_s: float
    latency_us: float
    tflops: float
    pair_bandwidth_gb_s: float
    loader_images_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The data set: images to train on in an epoch, and to evaluate after it. The default is ILSVRC-2012."""

    samples: int = 1_281_167
    evaluated: int = 50_000


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The model's step, seconds; see :func:`predict_step`."""

    compute_s: float
    crossing_s: float
    sum_s: float
    control_s: float
    load_s: float = 0.0

    @property
    def step_s(self) -> float:
        """A step: what the sum takes longer than the backward is waited for; the next batch is loaded meanwhile."""
        training = self.compute_s + self.crossing_s + max(0.0, self.sum_s - self.compute_s * 2 / 3) + self.control_s
        return max(self.load_s, training)

    @property
    def evaluation_step_s(self) -> float:
        """A batch of an evaluation: forward only."""
        return max(self.load_s, self.compute_s / 3 + self.crossing_s / 2 + self.control_s)


def count_traffic(config: Config, world: int, images: int) -> list[Traffic]:
    """Counts what the towers of a pair send in a step, by running it.

    Args:
        config: the recipe, of a net with two towers.
        world: GPUs, an even number.
        images: images a pair takes in a step.
    """
    return [_count(config, MeshCoord(rank, world), images) for rank in (0, 1)]


def _count(config: Config, coord: MeshCoord, images: int) -> Traffic:
    """One tower's count."""
    with fake_world(coord) as mesh:
        net = AlexNet(config.model, TowerLayers(config.model, mesh.link))
        train = dataclasses.replace(config.train, batch_size=coord.replicas, accumulate=1)
        side = config.model.image_px
        batch = torch.zeros(1, config.model.in_channels, side, side)
        ForwardBackward(net, train, mesh=mesh)(batch, torch.zeros(1, dtype=torch.int64), 0)
        mesh.link.control([0] * CONTROL_WORDS)
        if mesh.replicas:
            mesh.replicas.gather([0] * REPLICA_WORDS)
        rows = mesh.link.ledger.rows()
    outwards = {"a": ("a->b", "a->a"), "b": ("b->a", "b->b")}[coord.tower]
    sent = [row for row in rows if row.direction in outwards]

    def total(kind: str, what: str) -> int:
        return sum(getattr(row, what) for row in sent if row.kind == kind)

    return Traffic(
        tower=coord.tower,
        crossing_calls=total("crossing", "calls"),
        crossing_bytes=total("crossing", "num_bytes") * images,
        sum_calls=total("replica", "calls"),
        sum_bytes=total("replica", "num_bytes"),
        control_bytes=total("control", "num_bytes"),
    )


@contextmanager
def fake_world(coord: MeshCoord) -> Iterator[Mesh]:
    """The mesh as one process sees it, without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=coord.rank, world_size=coord.world)
    try:
        yield make_mesh(coord, store, backend="fake", timeout=TIMEOUT)
    finally:
        dist.destroy_process_group()


def predict(config: Config, traffic: Traffic, wires: Wires, *, replicas: int, images: int) -> Prediction:
    """The model's step with computation counted too: operations of an image on this tower x images / rate.

    2 operations a multiply-accumulate, forward once, backward twice, but nothing goes back through conv1.
    """
    operations = 0
    for row in count_layers(config.model):
        share = (1 if traffic.tower == "a" else 0) if row.layer == "fc8" else 0.5
        operations += 2 * (2 if row.layer == "conv1" else 3) * int(row.multiply_accumulates * share)
    step = predict_step(operations * images / (wires.tflops * 1e12), traffic, wires, replicas=replicas)
    return dataclasses.replace(step, load_s=images / wires.loader_images_s if wires.loader_images_s else 0.0)


def predict_step(compute_s: float, traffic: Traffic, wires: Wires, *, replicas: int) -> Prediction:
    """A MODEL of the step, not a measurement. With R replicas, bandwidths B (replicas) and P (pair), latency L:

    - compute: given, counted by :func:`predict` or measured by ``trainer bench``;
    - crossing = bytes / P + messages x L, counted whole: how much a tower hides behind its own half's products, if
      any, depends on the wire;
    - sum = 2 (R - 1) / R x bytes / B + sums x 2 (R - 1) x L, a ring; hidden behind the backward (2/3 of compute);
    - control = L + (R - 1) x L;
    - step = compute + crossing + max(0, sum - backward) + control.

    Checkpoints, stragglers and shared links are not in it; loading is added by :func:`predict`.
    """
    latency_s, steps = wires.latency_us * 1e-6, replicas - 1
    ring_bytes = 2 * steps / replicas * traffic.sum_bytes
    return Prediction(
        compute_s=compute_s,
        crossing_s=traffic.crossing_bytes / (wires.pair_bandwidth_gb_s * 1e9) + traffic.crossing_calls * latency_s,
        sum_s=ring_bytes / (wires.bandwidth_gb_s * 1e9) + traffic.sum_calls * 2 * steps * latency_s,
        control_s=latency_s * (1 + steps),
    )


def scale_table(
    config: Config, worlds: Sequence[int], *, images: int, wires: Wires | None, sizes: Sizes = Sizes()
) -> list[dict[str, Any]]:
    """A row for every number of GPUs: the count of the busier tower and, where ``wires`` are given, the model."""
    table = []
    for world in worlds:
        towers = count_traffic(config, world, images)
        row: dict[str, Any] = {"gpus": world, "batch_size": images * world // 2}
        row |= {"counted": [dataclasses.asdict(traffic) for traffic in towers]}
        if wires:
            options = {"replicas": world // 2, "images": images}
            steps = [predict(config, traffic, wires, **options) for traffic in towers]
            slower = max(steps, key=lambda step: step.step_s)
            row |= {"model": dataclasses.asdict(slower) | {"step_s": slower.step_s}}
            row["model"] |= _predict_epoch(slower, sizes, replicas=world // 2, images=images)
        table.append(row)
    return table


def _predict_epoch(step: Prediction, sizes: Sizes, *, replicas: int, images: int) -> dict[str, float]:
    """Seconds of an epoch's training, of the evaluation after it, and of opening the data set before the first."""
    return {
        "epoch_s": sizes.samples // (images * replicas) * step.step_s,
        "evaluation_s": -(-sizes.evaluated // (images * replicas)) * step.evaluation_step_s,
        "start_s": sizes.samples / replicas * OPEN_US * 1e-6,
    }


def print_scale(table: Sequence[dict[str, Any]], images: int, wires: Wires | None) -> None:
    """Prints the count, and the model where there is one."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.out(
        f"{pluralize(images, 'image')} a pair and step; counted by running the trainer's step on a fake process "
        "group. A GPU, a step:"
    )
    console.print(_counted(table))
    if wires is None:
        console.out("Add --bandwidth-gb-s, --latency-us and --tflops for the predicted time of a step.")
        return
    console.print(_predicted(table))
    console.out(FORMULA)
    console.out(MEASURED)
    loader = f", {wires.loader_images_s:,.0f} images/s a loader" if wires.loader_images_s else ", no loader"
    console.out(
        f"given: {wires.bandwidth_gb_s:g} GB/s between replicas, {wires.pair_bandwidth_gb_s:g} GB/s in a pair, "
        f"{wires.latency_us:g} us per message, {wires.tflops:g} TFLOP/s a GPU{loader}"
    )


def _counted(table: Sequence[dict[str, Any]]) -> Table:
    """The count of both towers."""
    shown = Table(title="counted, bytes: tower a | tower b", title_justify="left")
    for heading in ("GPUs", "batch", "crossings sent", "messages", "gradients summed", "sums", "control"):
        shown.add_column(heading, justify="right")
    names = ("crossing_bytes", "crossing_calls", "sum_bytes", "sum_calls", "control_bytes")
    for row in table:
        cells = [" | ".join(f"{tower[name]:,}" for tower in row["counted"]) for name in names]
        shown.add_row(f"{row['gpus']}", f"{row['batch_size']:,}", *cells)
    return shown


def _predicted(table: Sequence[dict[str, Any]]) -> Table:
    """The model."""
    shown = Table(title="predicted (a model), ms; epoch, evaluation and start-up in s", title_justify="left")
    headings = ("GPUs", "loading", "compute", "crossing", "sum", "control", "step", "images/s", "of 2 GPUs x n")
    for heading in (*headings, "epoch", "evaluation", "start-up"):
        shown.add_column(heading, justify="right")
    first = table[0]["batch_size"] / table[0]["gpus"] / table[0]["model"]["step_s"]
    for row in table:
        model = row["model"]
        cells = [
            f"{1e3 * model[f'{part}_s']:.2f}" for part in ("load", "compute", "crossing", "sum", "control", "step")
        ]
        rate = row["batch_size"] / model["step_s"]
        times = [f"{model[f'{part}_s']:,.1f}" for part in ("epoch", "evaluation", "start")]
        shown.add_row(f"{row['gpus']}", *cells, f"{rate:,.0f}", f"{rate / row['gpus'] / first:.0%}", *times)
    return shown
