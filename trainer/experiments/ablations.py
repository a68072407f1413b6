"""The ablations of the paper: what is taken away of a recipe, and the nets that made the paper's figures."""

import dataclasses
from pathlib import Path

from trainer.config import CROSSINGS, Config, ModelConfig, load_config
from trainer.config_toml import toml_text
from trainer.experiments.variants import BASELINE, Experiment, Metric, PaperFigure, Variant

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NORMS = ("lrn", "lrn_within_channel")
ILSVRC_2010, ILSVRC_2012 = "ILSVRC-2010 test, ten views", "ILSVRC-2012 val, ten views"
TOP1 = Metric("top1_error", "top-1 error, %", 100)
TOP5 = Metric("top5_error", "top-5 error, %", 100)
LOSS = Metric("loss", "held-out loss, nats", 1, 4)

# The nets and schedules that made the paper's figures, on configs/original.toml: runs #147, #148 and #150 of the
# authors' program. configs/README.md has the same values and says where they come from.
TRUE_NETS = {
    "no-normalization": (
        'model.post_ops=[["maxpool", "relu"], ["relu", "maxpool"], ["relu"], ["relu"], ["maxpool", "relu"]]',
    ),
    "no-overlap": (
        "model.pool_px=2",
        "model.pool_ceil=true",
        "model.paddings=[[0, 3], [1, 1], [1, 1], [1, 1], [0, 0]]",
    ),
    "no-crossings": (
        'model.crossings=["fc8"]',
        "model.channels=[48, 160, 192, 192, 128]",
        "model.hidden=[4096, 2048]",
    ),
}
TRUE_SCHEDULES = {
    "no-normalization": (
        "optimizer.milestones=[22.0, 44.0, 86.0]",
        'optimizer.layer_overrides=[{layer="conv1", epoch=69.0, learning_rate=1e-5}, '
        '{layer="conv1", epoch=73.0, learning_rate=0.0, bias_learning_rate=0.0}]',
        "data.color_off_epoch=69",
        "train.epochs=97",
    ),
    "no-overlap": (
        "optimizer.milestones=[23.0, 51.0, 79.0]",
        'optimizer.layer_overrides=[{layer="conv1", epoch=79.0, learning_rate=0.0, bias_learning_rate=0.0}]',
        "data.color_off_epoch=-1",
        "train.epochs=90",
    ),
    "no-crossings": (
        "optimizer.milestones=[25.0, 49.0, 79.0]",
        'optimizer.layer_overrides=[{layer="conv1", epoch=66.0, learning_rate=1e-5}, '
        '{layer="conv1", epoch=72.0, learning_rate=0.0, bias_learning_rate=0.0}]',
        "data.color_off_epoch=66",
        "train.epochs=92",
    ),
}
RUNS = {"no-normalization": "#148", "no-overlap": "#147", "no-crossings": "#150"}


def ablations(base: Config) -> Experiment:
    """What each part of the net is worth."""
    makers = (_normalization, _overlap, no_crossings, all_crossings, _half_size, _dropout, _color, _wire)
    found = [maker(base) for maker in makers]
    notes = [
        "Each interval is of one comparison: of eight changes that do nothing, one seems to do something in every "
        "third experiment."
    ]
    if base.model == _original().model:
        notes.append(_original_note(base))
    return Experiment(
        name="ablations",
        title="What each part of the net is worth",
        question="One part of the net or of its training is taken away at a time (paper, sections 3.3 to 3.5, 4.1, "
        "4.2). Held-out error, paired by seed with the whole net.",
        variants=(
            Variant(BASELINE, "the whole recipe", "Nothing is changed.", against=""),
            *(each for each in found if isinstance(each, Variant)),
        ),
        metrics=(TOP1, TOP5, LOSS),
        left_out=tuple(each for each in found if isinstance(each, str)),
        notes=tuple(notes),
    )


def _original() -> Config:
    return load_config(CONFIGS / "original.toml")


def _original_note(base: Config) -> str:
    if _is_original_schedule(base):
        return "The nets of runs #147, #148 and #150 with the schedule of each, as they made the paper's figures."
    return "The nets of runs #147, #148 and #150; the schedule is this recipe's, for it is not the original's."


def _is_original_schedule(base: Config) -> bool:
    original = _original()
    return base.optimizer == original.optimizer and base.train.epochs == original.train.epochs


def _true_values(base: Config, name: str) -> tuple[str, ...] | None:
    """The values of the authors' own run, where the recipe's net is the original; else None."""
    if base.model != _original().model:
        return None
    return TRUE_NETS[name] + (TRUE_SCHEDULES[name] if _is_original_schedule(base) else ())


def _normalization(base: Config) -> Variant | str:
    name, ops = "no-normalization", base.model.post_ops
    values = _true_values(base, name)
    if not any(op in NORMS for names in ops for op in names):
        return "no response normalization: this recipe has none to leave out"
    rest = [[op for op in names if op not in NORMS] for names in ops]
    return Variant(
        name,
        "no response normalization",
        f"Run {RUNS[name]}." if values else "lrn and lrn_within_channel are left out of model.post_ops.",
        values or (f"model.post_ops={toml_text(rest)}",),
        paper=PaperFigure("+1.37 top-1, +1.15 top-5", ILSVRC_2012),
    )


def _overlap(base: Config) -> Variant | str:
    name, model = "no-overlap", base.model
    values = _true_values(base, name)
    if model.pool_px <= model.pool_stride or not any("maxpool" in names for names in model.post_ops):
        return "pooling without overlap: this recipe's windows do not overlap"
    about = f"Run {RUNS[name]}: conv2 and conv5 pad less, too." if values else _overlap_sizes(model)
    return Variant(
        name,
        "pooling without overlap",
        about,
        values or (f"model.pool_px={model.pool_stride}",),
        paper=PaperFigure("+0.39 top-1, +0.30 top-5", ILSVRC_2012),
    )


def _overlap_sizes(model: ModelConfig) -> str:
    """What becomes of the maps: another size of fc6's input would be a second change."""
    side = dataclasses.replace(model, pool_px=model.pool_stride).final_side
    same = f"fc6 sees maps of {model.final_side} px as before"
    other = f"fc6 sees maps of {side} px instead of {model.final_side}, so it has more weights: not the window alone"
    return f"model.pool_px = {model.pool_stride}; {same if side == model.final_side else other}."


def no_crossings(base: Config) -> Variant | str:
    name = "no-crossings"
    values = _true_values(base, name)
    if base.model.towers != 2 or base.model.crossings == ("fc8",):
        return "no crossings: this recipe's towers do not cross"
    about = f"Run {RUNS[name]}: conv2 and fc6 are wider." if values else 'model.crossings = ["fc8"], same widths.'
    return Variant(
        name,
        "towers that cross only at fc8",
        about,
        values or ('model.crossings=["fc8"]',),
        paper=PaperFigure("+1.17 top-1, +1.12 top-5", ILSVRC_2012),
    )


def all_crossings(base: Config) -> Variant | str:
    model = base.model
    if model.towers != 2 or set(model.crossings) != set(CROSSINGS):
        return "every layer crosses: the recipe does not have the paper's towers"
    return Variant(
        "all-crossings",
        "every layer sees both towers",
        "One tower with the maps and units of both: conv2, conv4 and conv5 see all, and have twice the weights.",
        (
            "model.towers=1",
            f"model.channels={toml_text([2 * width for width in model.channels])}",
            f"model.hidden={toml_text([2 * width for width in model.hidden])}",
        ),
    )


def _half_size(base: Config) -> Variant | str:
    model = base.model
    if model.towers != 2:
        return "one tower of half size: this recipe has one tower"
    *first, last = model.channels
    return Variant(
        "half-size",
        "one tower of half size",
        "One tower of the same width, conv5 and the fully connected layers as wide as both (paper, section 3.5).",
        (
            "model.towers=1",
            f"model.channels={toml_text([*first, 2 * last])}",
            f"model.hidden={toml_text([2 * width for width in model.hidden])}",
        ),
        paper=PaperFigure("+1.70 top-1, +1.23 top-5", ILSVRC_2010),
    )


def _dropout(base: Config) -> Variant | str:
    if not base.model.dropout:
        return "no dropout: this recipe has none to leave out"
    return Variant(
        "no-dropout",
        "no dropout",
        "model.dropout = 0.",
        ("model.dropout=0.0",),
        paper=PaperFigure("\u201csubstantial overfitting\u201d, no figure", "ILSVRC-2010"),
    )


def _color(base: Config) -> Variant | str:
    if base.data.color == "none" or base.model.in_channels == 1:
        return "no color shift: this recipe has none to leave out"
    return Variant(
        "no-color-shift",
        "no color shift",
        'data.color = "none".',
        ("data.color=none",),
        paper=PaperFigure("over +1 top-1", "ILSVRC-2010"),
    )


def _wire(base: Config) -> Variant | str:
    if base.model.towers != 2 or base.train.comm_dtype != "same" or base.train.precision == "bf16":
        return "fp16 on the wire: this recipe's towers do not send fp32"
    return Variant(
        "fp16-wire",
        "what crosses is fp16",
        'train.comm_dtype = "fp16", in two processes: in one, nothing crosses.',
        ("train.comm_dtype=fp16",),
        paper=PaperFigure("-0.01 top-1, +0.37 top-5, against run #170", ILSVRC_2012),
        processes=2,
    )
