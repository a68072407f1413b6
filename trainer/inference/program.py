"""The merged net as a list of torch calls, for the metadata of a safetensors file: no code of this project runs it.

A line is ``[output, function, inputs, options]``: the function is one of ``torch.nn.functional`` or ``torch``, the
inputs are names of tensors of the file or outputs of lines before; the first is ``images``. ``docs/export.md`` has the
loop that runs it.
"""

from typing import Any

from trainer.config import LAYERS, ModelConfig
from trainer.inference.input_rule import InputRule
from trainer.model.layers import BATCH_NORM_EPSILON
from trainer.model.weights import groups_of, testing_factor

Line = list[Any]


class _Program:
    """Lines in order; each takes the output of the one before."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.end = "images"

    def add(self, function: str, output: str, *more: str, first: str | None = None, **options: Any) -> None:
        self.lines.append([output, function, [first or self.end, *more], options])
        self.end = output


def net_program(model: ModelConfig, rule: InputRule | None) -> list[Line]:
    """The lines from ``images`` to ``logits`` and ``probabilities``.

    Args:
        model: the net.
        rule: of the input: ``images`` is then uint8 (N, S, S, C); None: float32 (N, C, S, S), ready for the net.
    """
    program = _Program()
    if rule is not None:
        _input(program, rule)
    for index in range(5):
        _convolution(program, model, index)
    program.add("flatten", "flatten", start_dim=1)
    for layer in LAYERS[5:]:
        _connected(program, model, layer)
    program.add("softmax", "probabilities", dim=1)
    return program.lines


def _input(program: _Program, rule: InputRule) -> None:
    program.add("permute", "pixels", dims=[0, 3, 1, 2])
    program.add("sub", "centered", "input.mean")
    program.add("div", "input", "input.std")
    if rule.per_image:
        whole: dict[str, Any] = {"dim": [1, 2, 3], "keepdim": True}
        program.add("mean", "level", **whole)
        program.add("sub", "leveled", "level", first="input")
        program.add("square", "squares")
        program.add("mean", "variance", **whole)
        program.add("add", "variance.safe", other=rule.epsilon)
        program.add("rsqrt", "inverse")
        program.add("mul", "input.standard", "inverse", first="leveled")


def _convolution(program: _Program, model: ModelConfig, index: int) -> None:
    """A convolution and what follows it."""
    layer = LAYERS[index]
    before, after = model.paddings[index]
    if before != after:
        program.add("pad", f"{layer}.pad", pad=[before, after, before, after])
    program.add(
        "conv2d",
        layer,
        f"{layer}.weight",
        f"{layer}.bias",
        stride=model.strides[index],
        padding=before if before == after else 0,
        groups=groups_of(model, layer),
    )
    for number, name in enumerate(model.post_ops[index]):
        output = f"{layer}.{number}.{name}"
        if name == "batch_norm":
            kinds = ("running_mean", "running_var", "weight", "bias")
            names = [f"post{index + 1}.batch_norm.{kind}" for kind in kinds]
            program.add("batch_norm", output, *names, eps=BATCH_NORM_EPSILON)
        else:
            _then(program, model, output, name)


def _then(program: _Program, model: ModelConfig, output: str, name: str) -> None:
    """One of the operations of ``ModelConfig.post_ops`` that has no weights."""
    norm = model.lrn
    if name in ("relu", "tanh"):
        program.add(name, output)
    elif name == "maxpool":
        options: dict[str, Any] = {
            "kernel_size": model.pool_px,
            "stride": model.pool_stride,
            "ceil_mode": model.pool_ceil,
        }
        program.add("max_pool2d", output, **options)
    elif name == "lrn":  # within each tower; torch divides alpha by size
        program.add("unflatten", f"{output}.towers", dim=1, sizes=[model.towers, -1])
        program.add("flatten", f"{output}.batch", start_dim=0, end_dim=1)
        scaled: dict[str, Any] = {"size": norm.size, "alpha": norm.alpha * norm.size, "beta": norm.beta, "k": norm.k}
        program.add("local_response_norm", f"{output}.norm", **scaled)
        program.add("unflatten", f"{output}.split", dim=0, sizes=[-1, model.towers])
        program.add("flatten", output, start_dim=1, end_dim=2)
    else:
        _spatial_norm(program, model, output)


def _spatial_norm(program: _Program, model: ModelConfig, output: str) -> None:
    """``x * (1 + alpha * sum x^2)^-beta``, the sum over a window of the same map."""
    norm, x, size = model.lrn, program.end, model.lrn.within_channel_size
    program.add("square", f"{output}.square")
    program.add("avg_pool2d", f"{output}.mean", kernel_size=size, stride=1, padding=size // 2)
    program.add("mul", f"{output}.scaled", other=norm.within_channel_alpha * size**2)
    program.add("add", f"{output}.base", other=1.0)
    program.add("pow", f"{output}.power", exponent=-norm.beta)
    program.add("mul", output, x)


def _connected(program: _Program, model: ModelConfig, layer: str) -> None:
    """A fully connected layer, its activation, and the factor of dropout in testing."""
    groups, last = groups_of(model, layer), layer == "fc8"
    if groups == 1:
        program.add("linear", "logits" if last else layer, f"{layer}.weight", f"{layer}.bias")
    else:  # each tower its own units: a convolution over one pixel has groups
        weight = f"{layer}.weight.pixel"
        program.lines.append([weight, "unsqueeze", [f"{layer}.weight"], {"dim": -1}])
        program.add("unsqueeze", f"{layer}.pixel", dim=-1)
        program.add("conv1d", f"{layer}.groups", weight, f"{layer}.bias", groups=groups)
        program.add("flatten", layer, start_dim=1)
    if last:
        return
    program.add(model.activation, f"{layer}.{model.activation}")
    if testing_factor(model) != 1.0:
        program.add("mul", f"{layer}.dropout", other=testing_factor(model))
