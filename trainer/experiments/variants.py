"""What an experiment is: a list of variants, values on a recipe, and the figures in which they are compared."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from trainer.config import Config, load_config, to_toml

BASELINE = "baseline"
# Of every run of an experiment: its end is what counts, and dozens of runs fill a disk.
OF_EVERY_RUN = ("train.keep_checkpoints=1", "train.loggers=[]")


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """What the paper or the authors' logs found; it stands beside a result, never among results.

    Attributes:
        text: the figure.
        data_set: whose it is.
    """

    text: str
    data_set: str

    def __str__(self) -> str:
        return f"{self.text} ({self.data_set})"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A recipe with some values changed.

    Attributes:
        name: of its folder: letters, digits and hyphens.
        title: for people.
        about: what was changed, in a sentence.
        values: ``section.field=value`` texts on the experiment's recipe.
        against: the variant that it is compared with; empty for none.
        paper: what the paper found, or None.
        processes: 2 where the variant needs two; else 0, as the experiment says.
        four_layers: whether the net is figure 1's (``trainer.experiments.four_layers``), not the recipe's.
    """

    name: str
    title: str
    about: str
    values: tuple[str, ...] = ()
    against: str = BASELINE
    paper: PaperFigure | None = None
    processes: int = 0
    four_layers: bool = False

    def recipe(self, base: Config) -> Config:
        """The recipe of this variant.

        Raises:
            RecipeError: the values do not fit the recipe.
        """
        return load_config(None, (*OF_EVERY_RUN, *self.values), text=to_toml(base))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of a run.

    Attributes:
        key: its name in a row.
        title: for people, with its unit.
        scale: what the row's value is multiplied by to be shown: 100 for shares.
        digits: decimals shown.
        compared: whether variants are compared in it.
    """

    key: str
    title: str
    scale: float = 1.0
    digits: int = 2
    compared: bool = True

    def show(self, value: float | None, *, sign: bool = False) -> str:
        """A value as text; a dash for none."""
        return "\u2013" if value is None else f"{value * self.scale:{'+' if sign else ''}.{self.digits}f}"


Kind = Literal["none", "color", "epochs", "neighbors", "views"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments, on some recipe.

    Attributes:
        name: as on the command line.
        title: for people.
        question: what is asked, and how, in a paragraph.
        variants: at least one; the first is what others are compared with.
        metrics: figures of a row, the most important one first.
        measure: what is measured of a run besides its accuracy: see ``trainer.experiments.measures``.
        left_out: variants that this recipe has not, and why, a sentence each.
        notes: what a reader must know to read the result.
    """

    name: str
    title: str
    question: str
    variants: tuple[Variant, ...]
    metrics: tuple[Metric, ...]
    measure: Kind = "none"
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def variant(self, name: str) -> Variant:
        """One of the variants by its name."""
        return next(variant for variant in self.variants if variant.name == name)

    def only(self, names: Sequence[str]) -> "Experiment":
        """The same with these variants, and those that they are compared with."""
        wanted = {*names, *(variant.against for variant in self.variants if variant.name in names)}
        return dataclasses.replace(self, variants=tuple(each for each in self.variants if each.name in wanted))
