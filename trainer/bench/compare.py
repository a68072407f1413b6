"""Two results side by side; what differs by no more than the noise is said to be no difference. Pure functions.

Two medians differ where the notches around them (McGill, Tukey and Larsen 1978: median +- 1.57 IQR / sqrt(n)) do not
overlap, and by :data:`DRIFT` at least: a machine changes more between two runs than the rounds of one run show.
"""

import dataclasses

from trainer.bench.record import BenchRecord, Figure

DRIFT = 0.03


@dataclasses.dataclass(frozen=True)
class Difference:
    """One line of a comparison.

    Attributes:
        name: what was measured.
        unit: of both figures.
        a, b: the figures; None where one result lacks it.
        better: ``a``, ``b``, ``none`` (no difference), or empty where only one has it.
        factor: the better one over the other, >= 1; 1 where there is no difference.
    """

    name: str
    unit: str
    a: Figure | None
    b: Figure | None
    better: str
    factor: float


def compare(a: BenchRecord, b: BenchRecord) -> list[Difference]:
    """Wholes, stages and ceilings of two results, in the first one's order."""
    found = []
    for name, left, right in (
        ("end to end", a.whole, b.whole),
        ("loader alone", a.loader, b.loader),
        ("synthetic training", a.synthetic, b.synthetic),
    ):
        one, two = (_per_image(w.ms, r) if w else None for w, r in ((left, a), (right, b)))
        found.append(_difference(name, "us an image", one, two, smaller_wins=True))
    for name in dict.fromkeys(stage.name for stage in (*a.stages, *b.stages)):
        one, two = (_per_image(s.ms, r) if (s := r.stage(name)) else None for r in (a, b))
        found.append(_difference(name, "us an image", one, two, smaller_wins=True))
    for name in dict.fromkeys(ceiling.name for ceiling in (*a.ceilings, *b.ceilings)):
        left_c, right_c = a.ceiling(name), b.ceiling(name)
        unit = (left_c or right_c).unit  # type: ignore[union-attr]
        one, two = (c.figure if c else None for c in (left_c, right_c))
        found.append(_difference(name, unit, one, two, smaller_wins=unit == "us"))
    return [row for row in found if row.a or row.b]


def _per_image(ms: Figure, record: BenchRecord) -> Figure:
    """Microseconds an image, so that batches of different sizes can stand side by side."""
    return ms.scaled(1e3 / record.setting.batch_size)


def _difference(name: str, unit: str, a: Figure | None, b: Figure | None, *, smaller_wins: bool) -> Difference:
    if a is None or b is None:
        return Difference(name, unit, a, b, "", 1.0)
    if not differ(a, b):
        return Difference(name, unit, a, b, "none", 1.0)
    a_wins = (a.median < b.median) == smaller_wins
    low, high = sorted((a.median, b.median))
    return Difference(name, unit, a, b, "a" if a_wins else "b", high / low if low > 0 else float("inf"))


def differ(a: Figure, b: Figure) -> bool:
    """Whether two medians differ by more than their noise and more than machines drift."""
    gap = abs(a.median - b.median)
    return gap > a.noise + b.noise and gap > DRIFT * min(abs(a.median), abs(b.median))


def differing_settings(a: BenchRecord, b: BenchRecord) -> list[tuple[str, str, str]]:
    """What was set or found differently: (name, in a, in b)."""
    left, right = dataclasses.asdict(a.setting), dataclasses.asdict(b.setting)
    left |= {key: a.environment.get(key) for key in ("processor", "gpus", "torch", "commit")}
    right |= {key: b.environment.get(key) for key in ("processor", "gpus", "torch", "commit")}
    return [(key, str(left[key]), str(right[key])) for key in left if left[key] != right[key]]
