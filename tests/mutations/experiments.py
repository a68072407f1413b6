"""Experiments made wrong: differences, intervals, claims, colors, failures, and what is changed of a recipe."""

from collections.abc import Iterator

from tests.mutations import Change

FOLDER = "tests/trainer/experiments"
PAIRED, MEASURES, PAGE = (f"{FOLDER}/test_{name}.py" for name in ("paired", "measures", "page"))
CATALOG, CROPS = f"{FOLDER}/test_catalog.py", "tests/pipeline/sources/test_photo_crops.py"
WORKERS, TRICK = "tests/trainer/parallel/test_weird_trick.py", f"{FOLDER}/test_one_weird_trick.py"
FOUR_LAYERS = f"{FOLDER}/test_four_layers.py"
TABLE_OF_RUNS = f"{FOLDER}/test_command.py"


def of_paired() -> Iterator[Change]:
    """trainer/experiments/paired.py."""
    yield "paired: the other way round", "second[seed] - first[seed]", "first[seed] - second[seed]"
    yield "paired: deviation of all", "found.std(ddof=1)", "found.std(ddof=0)"
    yield "paired: one degree of freedom more", "t_quantile(len(found) - 1)", "t_quantile(len(found))"
    yield "paired: one side only", "(1 + CONFIDENCE) / 2", "CONFIDENCE"
    yield "paired: a deviation, no error of a mean", "/ math.sqrt(len(found))", "/ 1"
    yield "paired: bootstrap of one side", "50 * (1 - CONFIDENCE)", "100 * (1 - CONFIDENCE)"
    yield "paired: a claim although it spans zero", "not self.interval.spans_zero", "self.agree >= 1"
    yield "paired: zero at the edge", "self.low <= 0 <= self.high", "self.low < 0 < self.high"
    yield "paired: differences alike", "if len(found) < 2 or not _spreads(found):", "if len(found) < 2:", 1
    yield "paired: missing runs untold", "set(seeds)))", "set(seeds))[:0])"
    yield "paired: visible from all of it", "(interval.high - interval.low) / 2", "(interval.high - interval.low)"


def of_measures() -> Iterator[Change]:
    """trainer/experiments/measures.py."""
    yield "color: gray counts", "np.square(found - gray)", "np.square(found)"
    yield "color: of the whole sum", "total, color = energy.sum(axis=0)", "total, color = 1, energy.sum(axis=0)[1]"
    yield (
        "color: chance from below",
        "color_share(energy[order[half:]])) >= gap",
        "color_share(energy[order[half:]])) < gap",
    )
    yield "epochs: not between", "(after - before) * (high - level)", "(after - before) * (level - low)"
    yield "neighbors: the farthest", "- 2 * first @ second.T", "+ 2 * first @ second.T"
    yield "views: not averaged", "shares.unflatten(0, (-1, 10)).mean(1)", "shares.unflatten(0, (-1, 10))[:, 0]"


def of_rows() -> Iterator[Change]:
    """trainer/experiments/rows.py."""
    yield "rows: accuracy for error", "(total - round(share * total)) / total", "round(share * total) / total"


def of_summary() -> Iterator[Change]:
    """trainer/experiments/summary.py."""
    yield "figure 1: the slowest rate", "return (min(means", "return (max(means"
    yield "figure 1: also where a seed never came", "all(map(math.isfinite", "any(map(math.isfinite"
    yield "views: votes of one net", "else total + shares", "else shares"


def of_command() -> Iterator[Change]:
    """trainer/experiments/command.py."""
    yield "experiment: a failure is no exit code", "DONE_IN_PART if failed or stop.name", "DONE_IN_PART if stop.name"
    yield "experiment: what opens an address is kept", "to_toml(base), masked(source)", "to_toml(base), source"
    yield "experiment: a stop is a failure", "if stop.name and ending.status:", "if stop.name and not ending.status:"


def of_ablations() -> Iterator[Change]:
    """trainer/experiments/ablations.py."""
    yield "half size: narrow last layer", "[*first, 2 * last]", "[*first, last]"
    yield "no normalization: no pooling", "if op not in NORMS] for", 'if op not in (*NORMS, "maxpool")] for'
    yield "#147: pools round down", '"model.pool_ceil=true"', '"model.pool_ceil=false"'


def of_catalog() -> Iterator[Change]:
    """trainer/experiments/catalog.py."""
    yield "figure 1: decay", '"optimizer.weight_decay=0.0"', '"optimizer.weight_decay=0.1"'


def of_crops() -> Iterator[Change]:
    """pipeline/sources/photo_crops.py."""
    yield "crops: one half for both", 'HALVES = {"train": 0, "val": 1}', 'HALVES = {"train": 0, "val": 0}'
    yield (
        "crops: halves that overlap",
        "np.take(photo, range(-size, 0), axis)",
        "np.take(photo, range(-size - 1, 0), axis)",
    )
    yield "crops: the seed is not asked", "shuffled(height * width, seed,", "shuffled(height * width, 0,"


def of_workers() -> Iterator[Change]:
    """trainer/parallel/weird_trick.py: the one-weird-trick layout."""
    yield (
        "workers: fc6's gradient of the other's units is lost",
        "grad_local.add_(link.wait(transfer))",
        "link.wait(transfer)",
    )
    yield (
        "workers: rows the wrong way round",
        'return (first, second) if link.tower == "a" else (second, first)',
        ("return first, second"),
    )
    yield "workers: both drop the first units", "chunk(WORKERS, dim=1)[self._place]", "chunk(WORKERS, dim=1)[0]"
    yield "workers: own logits only", "torch.logaddexp(sums, theirs[:, 0])", "sums"
    yield "workers: pairs are not averaged", "(loss / self._coord.replicas).backward()", "loss.backward()"
    yield "workers: pairs draw the same masks", "first=self._coord.replica * len(labels)", "first=0"
    yield "workers: fully connected layers are not summed", "if mesh.replicas:", "if mesh.replicas is mesh:"
    yield "workers: fc6's weight sees its own rows only", ".addmm_(y_remote.t(), remote)", ""


def of_traffic() -> Iterator[Change]:
    """trainer/experiments/one_weird_trick/traffic.py."""
    yield "bytes: a ring sends all", "2 * (self.summed_by - 1) / self.summed_by", "1"
    yield "bytes: fc8 one way", "2 * model.hidden[1] // 2", "model.hidden[1] // 2"
    yield "bytes: two batches, one slope", "divmod(second[name] - num_bytes, world)", "divmod(num_bytes, world)"


def of_trick() -> Iterator[Change]:
    """trainer/experiments/one_weird_trick/found.py."""
    yield "trick: bytes are not looked at", "return bytes_alike and all(", "return all("
    yield (
        "trick: gradients are not looked at",
        'COMPARED = ("loss", "gradients", "weights")',
        'COMPARED = ("loss", "weights")',
    )


def of_trick_command() -> Iterator[Change]:
    """trainer/experiments/one_weird_trick/command.py."""
    yield (
        "trick: what is not equal is fine",
        "if found.failed or found.unequal or found.speed is None else 0",
        ("if found.failed or found.speed is None else 0"),
    )
    yield "trick: made again", 'if row and row["status"] == rows.OK and', 'if row and row["status"] == rows.FAILED and'


def of_four_layers() -> Iterator[Change]:
    """trainer/experiments/four_layers.py."""
    yield "four layers: pooled twice as coarse", "POOL_PX, POOL_STRIDE, ceil_mode=True", "POOL_PX, POOL_STRIDE"
    yield "four layers: velocities forgotten", "velocity(parameter).copy_(", "velocity(parameter).add_(0 * "
    yield "four layers: the same draw for every layer", '"init", name))', '"init", ""))'
    yield "four layers: an epoch longer", "train.epochs * self.loader", "(train.epochs + 1) * self.loader"
    yield "four layers: the loader from its beginning", 'state=state.get("loader")', "state=None"


GROUPS = (
    ("trainer/parallel/weird_trick.py", (WORKERS,), of_workers),
    ("trainer/experiments/one_weird_trick/traffic.py", (WORKERS,), of_traffic),
    ("trainer/experiments/one_weird_trick/found.py", (TRICK,), of_trick),
    ("trainer/experiments/one_weird_trick/command.py", (TRICK,), of_trick_command),
    ("trainer/experiments/paired.py", (PAIRED,), of_paired),
    ("trainer/experiments/measures.py", (MEASURES,), of_measures),
    ("trainer/experiments/rows.py", (TABLE_OF_RUNS, PAGE), of_rows),
    ("trainer/experiments/summary.py", (PAGE,), of_summary),
    ("trainer/experiments/command.py", (TABLE_OF_RUNS,), of_command),
    ("trainer/experiments/ablations.py", (CATALOG,), of_ablations),
    ("trainer/experiments/catalog.py", (CATALOG,), of_catalog),
    ("trainer/experiments/four_layers.py", (FOUR_LAYERS,), of_four_layers),
    ("pipeline/sources/photo_crops.py", (CROPS,), of_crops),
)
