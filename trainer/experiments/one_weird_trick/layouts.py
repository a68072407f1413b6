"""The two nets of the comparison, out of one recipe: the paper's two towers, and one tower of the width of both."""

import dataclasses

from trainer.config import Config, load_config, to_toml
from trainer.errors import RecipeError
from trainer.experiments.ablations import all_crossings

# Steps are compared and timed, no epochs are trained: fp32 on the wire and in products, one piece.
OF_BOTH = ("train.precision=fp32", "train.comm_dtype=same", "train.accumulate=1", "data.last_batch=drop")


@dataclasses.dataclass(frozen=True)
class Layouts:
    """Recipes.

    Attributes:
        towers: two towers that cross as the paper's.
        one_tower: the net of the one-weird-trick layout.
    """

    towers: Config
    one_tower: Config

    @property
    def recipes(self) -> dict[str, Config]:
        """By name."""
        return {"two-towers": self.towers, "one-tower": self.one_tower}


def make_layouts(base: Config) -> Layouts:
    """Both nets of a recipe.

    Raises:
        RecipeError: it does not have the paper's towers.
    """
    wide = all_crossings(base)
    if isinstance(wide, str):
        raise RecipeError(
            "one-weird-trick compares with two towers that cross at conv3, fc6, fc7 and fc8: expected model.towers = 2 "
            f"and these four in model.crossings, as in configs/paper.toml (here {base.model.towers} and "
            f"{', '.join(base.model.crossings)})"
        )
    towers = load_config(None, OF_BOTH, text=to_toml(base))
    return Layouts(towers, load_config(None, wide.values, text=to_toml(towers)))
