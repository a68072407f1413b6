"""The merged net as an ONNX graph, written node by node: ``images`` to ``logits`` and ``probabilities``, a free batch.

With an input rule the images are uint8 (N, S, S, C), as any program decodes them, and mean, deviation and layout are
nodes; without one they are float32 (N, C, S, S), ready for the net.

Built from the recipe rather than by ``torch.onnx.export``, which would take response normalization apart into a dozen
nodes and need onnxscript; here every node has its layer's name, and response normalization is ONNX's own ``LRN``, one
for each tower. ONNX divides alpha by ``size``; the recipe's alpha is on the sum. The factor of dropout in
testing is a node of its own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from trainer.config import LAYERS, Config, ModelConfig
from trainer.errors import ExportError
from trainer.inference.input_rule import InputRule
from trainer.model.layers import BATCH_NORM_EPSILON
from trainer.model.weights import block_diagonal, groups_of, testing_factor

OPSET = 17
IR_VERSION = 8  # of ONNX 1.12, the first with opset 17: older runtimes can read it


class _Graph:
    """Nodes and constants, in the order in which they were added; ``end`` names the newest tensor."""

    def __init__(self, helper: Any, numpy_helper: Any) -> None:
        self._helper, self._numpy_helper = helper, numpy_helper
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.end = "images"

    def constant(self, name: str, value: Tensor | np.ndarray | float) -> str:
        """Adds a named float32 constant."""
        array = value.numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
        self.constants.append(self._numpy_helper.from_array(np.ascontiguousarray(array) if array.ndim else array, name))
        return name

    def add(self, kind: str, name: str, *more: str, **attributes: Any) -> None:
        """Adds a node that takes ``end`` and ``more``; its output becomes ``end``."""
        self.nodes.append(self._helper.make_node(kind, [self.end, *more], [name], name=name, **attributes))
        self.end = name

    def add_halves(self, kind: str, name: str, towers: int, **attributes: Any) -> None:
        """Adds a node for each tower's half of the maps."""
        if towers == 1:
            self.add(kind, name, **attributes)
            return
        halves = [f"{name}.{tower}.maps" for tower in "ab"]
        self.nodes.append(self._helper.make_node("Split", [self.end], halves, name=f"{name}.split", axis=1))
        done = [f"{name}.{tower}" for tower in "ab"]
        for half, output in zip(halves, done, strict=True):
            self.nodes.append(self._helper.make_node(kind, [half], [output], name=output, **attributes))
        self.nodes.append(self._helper.make_node("Concat", done, [name], name=name, axis=1))
        self.end = name


def onnx_bytes(
    config: Config, merged: Mapping[str, Tensor], facts: Mapping[str, str], rule: InputRule | None = None
) -> bytes:
    """Serializes the net.

    Args:
        config: the recipe.
        merged: weights as :func:`trainer.model.weights.merge_towers` gives them.
        facts: metadata of the file.
        rule: of the input; None: the graph begins with the net.

    Raises:
        ExportError: the package onnx is not installed, or the net has an operation that is not known here.
    """
    try:
        from onnx import TensorProto, checker, helper, numpy_helper
    except ImportError:
        raise ExportError("ONNX needs the package onnx: pip install onnx onnxruntime -c constraints.txt") from None
    model = config.model
    graph = _Graph(helper, numpy_helper)
    if rule is not None:
        _input(graph, rule)
    for index in range(5):
        _convolution(graph, model, index, merged)
    graph.add("Flatten", "flatten", axis=1)
    for layer in LAYERS[5:]:
        _connected(graph, model, layer, merged)
    side = model.image_px
    graph.add("Softmax", "probabilities", axis=1)
    shape: list[str | int | None] = (
        ["N", model.in_channels, side, side] if rule is None else ["N", side, side, model.in_channels]
    )
    kind = TensorProto.FLOAT if rule is None else TensorProto.UINT8
    images = helper.make_tensor_value_info("images", kind, shape)
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", model.classes])
        for name in ("logits", "probabilities")
    ]
    whole = helper.make_graph(graph.nodes, "twotower", [images], outputs, graph.constants)
    opsets = [helper.make_opsetid("", OPSET)]
    proto = helper.make_model(whole, opset_imports=opsets, producer_name="twotower", ir_version=IR_VERSION)
    helper.set_model_props(proto, dict(facts))
    checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _input(graph: _Graph, rule: InputRule) -> None:
    """From uint8 (N, S, S, C) to what the net sees."""
    graph.add("Transpose", "pixels", perm=[0, 3, 1, 2])
    graph.add("Cast", "levels", to=1)  # float32
    graph.add("Sub", "centered", graph.constant("input.mean", rule.mean))
    graph.add("Div", "input", graph.constant("input.std", rule.std))
    if rule.per_image:
        whole: dict[str, Any] = {"axes": [1, 2, 3], "keepdims": 1}
        graph.add("ReduceMean", "level", **whole)
        graph.end = "input"
        graph.add("Sub", "leveled", "level")
        graph.add("Mul", "squares", "leveled")
        graph.add("ReduceMean", "variance", **whole)
        graph.add("Add", "variance.safe", graph.constant("input.epsilon", rule.epsilon))
        graph.add("Sqrt", "deviation")
        graph.end = "leveled"
        graph.add("Div", "input.standard", "deviation")


def _convolution(graph: _Graph, model: ModelConfig, index: int, merged: Mapping[str, Tensor]) -> None:
    """A convolution and what follows it."""
    layer = LAYERS[index]
    before, after = model.paddings[index]
    graph.add(
        "Conv",
        layer,
        graph.constant(f"{layer}.weight", merged[f"{layer}.weight"]),
        graph.constant(f"{layer}.bias", merged[f"{layer}.bias"]),
        kernel_shape=[model.kernel_sizes[index]] * 2,
        strides=[model.strides[index]] * 2,
        pads=[before, before, after, after],
        group=groups_of(model, layer),
    )
    for name in model.post_ops[index]:
        if name == "batch_norm":
            names = [f"post{index + 1}.batch_norm.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")]
            tensors = [graph.constant(name, merged[name]) for name in names]
            graph.add("BatchNormalization", f"{layer}.batch_norm", *tensors, epsilon=BATCH_NORM_EPSILON)
        else:
            _then(graph, model, f"{layer}.{name}", name)


def _then(graph: _Graph, model: ModelConfig, output: str, name: str) -> None:
    """One operation of ``ModelConfig.after``."""
    norm = model.lrn
    if name in ("relu", "tanh"):
        graph.add({"relu": "Relu", "tanh": "Tanh"}[name], output)
    elif name == "maxpool":
        window = {"kernel_shape": [model.pool_px] * 2, "strides": [model.pool_stride] * 2}
        graph.add("MaxPool", output, **window, ceil_mode=int(model.pool_ceil))
    elif name == "lrn":
        scaled = {"alpha": norm.alpha * norm.size, "beta": norm.beta, "bias": norm.k}
        graph.add_halves("LRN", output, model.towers, size=norm.size, **scaled)
    elif name == "lrn_within_channel":
        _spatial_norm(graph, model, output)
    else:
        raise ExportError(f"{output}: the operation {name} cannot be exported to ONNX yet; use .safetensors")


def _spatial_norm(graph: _Graph, model: ModelConfig, output: str) -> None:
    """``x * (1 + alpha * sum x^2)^-beta``, the sum over a window of the same map."""
    norm, x = model.lrn, graph.end
    window = [norm.within_channel_size] * 2
    scale = norm.within_channel_alpha * norm.within_channel_size**2  # AveragePool divides by the window
    graph.add("Mul", f"{output}.square", x)
    graph.add(
        "AveragePool",
        f"{output}.mean",
        kernel_shape=window,
        strides=[1, 1],
        pads=[norm.within_channel_size // 2] * 4,
        count_include_pad=1,
    )
    graph.add("Mul", f"{output}.scaled", graph.constant(f"{output}.alpha", scale))
    graph.add("Add", f"{output}.base", graph.constant(f"{output}.one", 1.0))
    graph.add("Pow", f"{output}.power", graph.constant(f"{output}.beta", -norm.beta))
    graph.add("Mul", output, x)


def _connected(graph: _Graph, model: ModelConfig, layer: str, merged: Mapping[str, Tensor]) -> None:
    """A fully connected layer, its activation, and the factor of dropout in testing."""
    weight = graph.constant(f"{layer}.weight", block_diagonal(model, layer, merged[f"{layer}.weight"]))
    last = layer == "fc8"
    graph.add(
        "Gemm", "logits" if last else layer, weight, graph.constant(f"{layer}.bias", merged[f"{layer}.bias"]), transB=1
    )
    if last:
        return
    _then(graph, model, f"{layer}.{model.activation}", model.activation)
    if testing_factor(model) != 1.0:
        factor = graph.constant(f"{layer}.test_factor", testing_factor(model))
        graph.add("Mul", f"{layer}.dropout", factor)
