"""Whether a recipe and a data set fit each other, what it takes from the data set, and what to tell of the two."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.manifest import Manifest
from trainer.config import Config
from trainer.errors import RecipeError
from twotower.words import listed, pluralize

SMALL_CROP = 0.5  # of the stored side: a crop below sees so little of an image that training is on details
TOP5_CLASSES = 6  # with fewer classes the five likeliest are all of them


@dataclasses.dataclass(frozen=True)
class Misfit:
    """Something in which a recipe and a data set contradict each other.

    Attributes:
        text: what, with both values.
        fix: ``section.field=value`` that would mend it; empty where the data set has to be prepared anew.
    """

    text: str
    fix: str = ""


def resolve(config: Config, manifest: Manifest) -> Config:
    """The recipe with the data set's own number of classes and channels where it says 0."""
    model = config.model
    if model.classes and model.in_channels:
        return config
    classes, channels = model.classes or len(manifest.classes), model.in_channels or manifest.image.channels
    return dataclasses.replace(config, model=dataclasses.replace(model, classes=classes, in_channels=channels))


def check_resolved(config: Config) -> None:
    """Refuses a recipe whose net has no size yet, where no data set is at hand.

    Raises:
        RecipeError: naming the fields.
    """
    open_ = {"classes": "model.classes=10", "in_channels": "model.in_channels=3"}
    fixes = [words for name, words in open_.items() if not getattr(config.model, name)]
    if fixes:
        names = " and ".join(f"{words.partition('=')[0]} = 0" for words in fixes)
        raise RecipeError(
            f"{names}: taken from a data set, and there is none here; give --data DIR where the command has it, or "
            + " ".join(f"--set {words}" for words in fixes)
        )


def check_fits(
    config: Config, manifest: Manifest, data: Path, *, splits: Sequence[str] | None = None, extend: bool = False
) -> Config:
    """Checks that a data set is what a recipe's net can train on, before anything is started.

    Args:
        config: the recipe.
        manifest: the data set's record.
        data: its folder, for the message.
        splits: those that are read; None for those of training, which need enough images besides.
        extend: end the message with this process's own command and the options that would mend it.

    Returns:
        The recipe, with the data set's own numbers where it says 0.

    Raises:
        RecipeError: naming everything that does not fit, and what would.
    """
    if len(manifest.classes) < 2:
        raise RecipeError(
            f"{data} has one class, {manifest.classes[0].title!r}: a net tells classes apart; prepare a folder with "
            "two class folders or more"
        )
    found = misfits(config, manifest, splits)
    if not found:
        return resolve(config, manifest)
    message = f"{data} does not fit the recipe: " + "; ".join(misfit.text for misfit in found)
    fixes = [misfit.fix for misfit in found if misfit.fix]
    if len(fixes) == len(found) and extend:
        words = [word for text in fixes for word in ("--set", text)]
        message += f"; try: {shlex.join(['python', '-m', 'trainer', *sys.argv[1:], *words])}"
    raise RecipeError(message)


def misfits(config: Config, manifest: Manifest, splits: Sequence[str] | None = None) -> list[Misfit]:
    """Everything in which a recipe and a data set contradict each other."""
    image, model = manifest.image, config.model
    found = []
    if model.in_channels not in (0, image.channels):
        text = f"model.in_channels = {model.in_channels}, and its images have {image.channels}"
        found.append(Misfit(text, f"model.in_channels={image.channels}"))
    if model.classes not in (0, len(manifest.classes)):
        text = f"model.classes = {model.classes}, and it has {pluralize(len(manifest.classes), 'class')}"
        found.append(Misfit(text, f"model.classes={len(manifest.classes)}"))
    found += _of_sizes(config, manifest)
    if splits is None:
        return found + _of_training(config, manifest)
    has = listed(manifest.splits)
    return found + [Misfit(f"it has no split {name!r}: it has {has}") for name in splits if name not in manifest.splits]


def _of_sizes(config: Config, manifest: Manifest) -> list[Misfit]:
    image, side = manifest.image, config.model.image_px
    smallest = min(image.height_px or side, image.width_px or side)
    if smallest >= side:
        return []
    text = f"model.image_px = {side}, and its images are {smallest} px (prepare with --resize {side} or more fits)"
    try:
        dataclasses.replace(config.model, image_px=smallest)
    except RecipeError:  # nothing would be left of such an input
        return [Misfit(text)]
    return [Misfit(text, f"model.image_px={smallest}")]


def _of_training(config: Config, manifest: Manifest) -> list[Misfit]:
    train, splits = config.train, manifest.splits
    found = []
    if "train" not in splits:
        found.append(Misfit(f"it has no split 'train': it has {listed(splits)}"))
    elif splits["train"].num_samples < train.batch_size and config.data.last_batch == "drop":
        count = splits["train"].num_samples
        fitting = count - count % train.accumulate
        text = f"train.batch_size = {train.batch_size}, and it has only {pluralize(count, 'training image')}"
        found.append(Misfit(text, f"train.batch_size={fitting}" if fitting else ""))
    if train.evaluate_split not in splits:
        others = [name for name in splits if name != "train"]
        name, has = train.evaluate_split, listed(splits)
        text = f"train.evaluate_split = {name!r}, and it has no split {name!r}: it has {has}"
        if not others:
            text += "; prepare splits one off with --val-fraction, which every class must have images enough for"
        found.append(Misfit(text, f"train.evaluate_split={others[0]}" if others else ""))
    return found


def notes(config: Config, manifest: Manifest, num_samples: int) -> list[str]:
    """What is worth knowing of a recipe and a data set that fit, before hours are spent.

    Args:
        config: the recipe, resolved.
        manifest: the data set's record.
        num_samples: images of the training split, without those of a skip list.
    """
    found = []
    side, image = config.model.image_px, manifest.image
    stored = min(image.height_px or side, image.width_px or side)
    if side < SMALL_CROP * stored:
        found.append(
            f"model.image_px = {side}, and the images are {stored} px: a crop shows {100 * (side / stored) ** 2:.0f} % "
            f"of an image; prepare them smaller (--resize {round(side * 9 / 8)}), or take a recipe for larger crops"
        )
    size = config.train.batch_size
    left = num_samples % size
    if left and config.data.last_batch == "drop":
        which = "the same" if config.data.shuffle == "once" else "others"
        found.append(
            f"an epoch leaves {left:,} of {num_samples:,} training images out, {which} in each: its last batch would "
            f"have fewer than {size} (data.last_batch = 'partial' trains on them, too)"
        )
    return found
