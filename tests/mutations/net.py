"""The net made wrong: layers, norms, dropout, loss, initial weights, the crossings of two processes."""

from collections.abc import Iterator

from tests.mutations import Change

ALEXNET = "tests/trainer/model/test_alexnet.py"
RUN_145 = "tests/trainer/model/test_run_145.py"
NORM = "tests/trainer/model/test_response_norm.py"
KERNELS = "tests/trainer/model/test_kernels.py"
GPU_LAYERS = "tests/trainer/model/test_gpu_layers.py"
GPU_PASSES = "tests/trainer/model/test_gpu_passes.py"
INTERPRETED = "tests/trainer/model/test_kernels_triton.py::test_interpreted_kernels_equal_the_formulas"
PRECISION = "tests/trainer/test_precision.py"
RECIPES = "tests/trainer/test_recipes.py"
OPTIMIZER = "tests/trainer/training/test_optimizer.py"
CROSSING = "tests/trainer/parallel/test_crossing.py"
EQUALITY = "tests/trainer/parallel/test_equality.py"
OVERLAP = "tests/trainer/parallel/test_overlap.py"
OPS = "for name in config.post_ops[index]:"
SHAPE = "shape = config.kernel_sizes[index], config.strides[index], config.paddings[index]"
SEES_BOTH = "return 1 if layer in self._config.crossings else len(self.towers)"
LAYER_NAMES = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
OF_145 = (
    ("lrn", "maxpool", "relu"),
    ("relu", "lrn", "lrn_within_channel", "maxpool"),
    ("relu",),
    ("relu",),
    ("maxpool", "relu"),
)
SHIFTED = ("(1, 2)", "(1, 3)", "(0, 2)", "(0, 2)", "(2, 0)")  # zeros of the same number, elsewhere
BY_HAND = f"{NORM}::test_spatial_norm_by_hand"
FOLLOWS = f"{ALEXNET}::test_what_follows_a_layer_by_hand"
MASKS = f"{ALEXNET}::test_dropout_masks_are_pure_and_differ"
DROPS = f"{ALEXNET}::test_dropout_in_training_and_in_testing"
UNITS = f"{ALEXNET}::test_training_drops_units_of_both_layers"
LOSS = f"{ALEXNET}::test_the_loss_is_a_mean_over_the_batch"
GAUSSIAN = f"{ALEXNET}::test_initial_weights_are_gaussian"
ALIKE = f"{ALEXNET}::test_no_two_initial_weights_are_alike"
NARROW = f"{RUN_145}::test_equals_run_145_in_a_narrow_net"


def of_layers() -> Iterator[Change]:
    """trainer/model/layers.py: every convolution's shape, what follows it, groups, dropout."""
    for index, layer in enumerate(LAYER_NAMES[:5]):
        start = "shape = config.kernel_sizes[index]"
        stride = f'config.strides[index] + (layer == "{layer}")'
        yield f"{layer}: stride + 1", SHAPE, f"{start}, {stride}, config.paddings[index]"
        paddings = f'{SHIFTED[index]} if layer == "{layer}" else config.paddings[index]'
        yield f"{layer}: zeros shifted", SHAPE, f"{start}, config.strides[index], {paddings}"
        for op in OF_145[index]:
            left = f"[op for op in config.post_ops[index] if (index, op) != ({index}, {op!r})]"
            yield f"{layer}: no {op} after it", OPS, f"for name in {left}:"
    for index in (0, 1):
        order = f"config.post_ops[index][:: -1 if index == {index} else 1]"
        yield f"conv{index + 1}: what follows in reverse order", OPS, f"for name in {order}:"
    for layer in ("conv2", "conv4", "conv5"):
        yield (
            f"{layer}: dense instead of grouped",
            SEES_BOTH,
            SEES_BOTH.replace("layer in", f'layer == "{layer}" or layer in'),
        )
    for layer in ("conv3", "fc6", "fc7"):
        mutated = f'return 1 if layer in self._config.crossings and layer != "{layer}" else len(self.towers)'
        yield f"{layer}: no crossing", SEES_BOTH, mutated
    yield "ReLU: leaky", "nn.ReLU(inplace=True)", "nn.LeakyReLU(0.01, inplace=True)"
    yield "ReLU before the norm: not fused in", "rectify=rectify)", "rectify=False)"
    yield "tanh: missing", "module = nn.Tanh()", "module = nn.Identity()"
    yield "pool: 2 px", "nn.MaxPool2d(config.pool_px,", "nn.MaxPool2d(config.pool_px - 1,"
    yield "pool: stride 3", "config.pool_stride, ceil_mode", "config.pool_stride + 1, ceil_mode"
    yield "pool: never rounds up", "ceil_mode=config.pool_ceil", "ceil_mode=False"
    yield "pool: always rounds up", "ceil_mode=config.pool_ceil", "ceil_mode=True"
    yield "pool: average", "nn.MaxPool2d(", "nn.AvgPool2d("
    yield (
        "norm: across both towers",
        "LocalResponseNorm(channels, config.lrn",
        "LocalResponseNorm(channels * num_towers, config.lrn",
    )
    yield "batch norm: momentum", "BATCH_NORM_MOMENTUM = 0.1", "BATCH_NORM_MOMENTUM = 0.01"
    yield "batch norm: epsilon", "BATCH_NORM_EPSILON = 1e-5", "BATCH_NORM_EPSILON = 1e-3"
    zeros = "(before, after, before, after)"
    yield "zeros at the other sides", zeros, "(after, before, after, before)"
    yield "zeros of rows and columns differ", zeros, "(before, after, after, before)"


def of_dropout() -> Iterator[Change]:
    """trainer/model/layers.py: masks and what the outputs are multiplied by."""
    draw = "stable_seed(self.seed, self.step, tower, layer)"
    yield "dropout: same mask in both towers", draw, 'stable_seed(self.seed, self.step, "a", layer)'
    yield "dropout: same mask in all steps", draw, "stable_seed(self.seed, 0, tower, layer)"
    yield "dropout: same mask in both layers", draw, 'stable_seed(self.seed, self.step, tower, "fc6")'
    yield "dropout: same mask in all runs", draw, "stable_seed(0, self.step, tower, layer)"
    yield "dropout: keeps what it should drop", "(lanes >= least)", "(lanes < least)"
    yield (
        "dropout: rate",
        "self.rate, self.inverted = config.dropout,",
        "self.rate, self.inverted = config.dropout / 2,",
    )
    yield "dropout: the other kind", 'config.dropout_kind == "inverted"', 'config.dropout_kind != "inverted"'
    yield "dropout: a piece takes the first rows", "_counted(begin, self.first * words,", "_counted(begin, 0,"
    yield "dropout: rows overlap", "_counted(begin, self.first * words,", "_counted(begin, self.first,"
    yield "dropout: a lane too few", "LANES * words)[:, :units]", "LANES * words)[:, 1 : units + 1]"
    yield "dropout: another hash", "(words >> 27)", "(words >> 28)"
    yield "dropout: mask of the first tower only", "draws.mask(tower, self.layer,", 'draws.mask("a", self.layer,'
    yield "dropout: not halved in testing", "x if self.inverted else x * (1 - self.rate)", "x"
    yield "dropout: halved in training", "x / (1 - self.rate) if self.inverted else x", "x / (1 - self.rate)"
    yield "dropout: inverted, not divided", "x / (1 - self.rate) if self.inverted else x", "x"
    yield "fc6, fc7: tanh is ReLU", '"tanh": torch.tanh', '"tanh": functional.relu_'
    yield "fc6, fc7: ReLU is tanh", '"relu": functional.relu_', '"relu": torch.tanh'


def of_alexnet() -> Iterator[Change]:
    """trainer/model/alexnet.py: the order of layers, the loss."""
    for number in (6, 7):
        line = f"self.drop{number}(self.fc{number}(x), draws)"
        no_drop = f'(functional.relu_ if self.config.activation == "relu" else torch.tanh)(self.fc{number}(x))'
        yield f"fc{number}: no dropout", line, no_drop
        yield f"fc{number}: no dropout in training", line, f"{no_drop} if self.training else {line}"
        yield f"fc{number}: no activation", f'"fc{number}", held, config.activation)', f'"fc{number}", held)'
    yield "fc6: dropout drawn as fc7's", 'Dropout(config, "fc6", held,', 'Dropout(config, "fc7", held,'
    yield "fc6 reads columns first", "x = x.flatten(1)", "x = x.transpose(2, 3).flatten(1)"
    yield "fc6 reads channels last", "x = x.flatten(1)", "x = x.permute(0, 2, 3, 1).flatten(1)"
    yield "fc6 reads tower b first", "x = x.flatten(1)", "x = x.roll(x.shape[1] // 2, 1).flatten(1)"
    yield "loss: sum", "torch.float32)), labels)", 'torch.float32)), labels, reduction="sum")'
    yield "loss: smoothed labels", "torch.float32)), labels)", "torch.float32)), labels, label_smoothing=0.1)"
    yield "towers swapped in split_towers", "zip(owners, tensor.chunk", "zip(owners[::-1], tensor.chunk"


def of_start() -> Iterator[Change]:
    """trainer/model/alexnet.py: the initial weights."""
    normal, fill = "normal_(0.0, std, ", "fill_(bias)"
    for layer in LAYER_NAMES:
        yield f"{layer}: initial weights x 1.5", normal, f'normal_(0.0, std * (1.5 if layer == "{layer}" else 1), '
        yield f"{layer}: initial biases + 1", fill, f'fill_(bias + (layer == "{layer}"))'
    yield "initial weights: uniform", normal, "uniform_(-std * 3**0.5, std * 3**0.5, "
    yield "initial weights: mean of one deviation", normal, "normal_(std, std, "
    seeded = 'stable_seed(seed, "init", tower, layer)'
    yield "initial weights: same in both towers", seeded, 'stable_seed(seed, "init", layer)'
    yield "initial weights: same in all layers", seeded, 'stable_seed(seed, "init", tower)'
    yield "initial weights: same for all seeds", seeded, 'stable_seed("init", tower, layer)'


def of_response_norm() -> Iterator[Change]:
    """trainer/model/response_norm.py: formulas and what the layers hand to them."""
    forward = "wide * _power(k + alpha * window(wide * wide, size), beta)"
    yield "norm, formula: alpha x 10", forward, forward.replace("alpha *", "10 * alpha *")
    yield "norm, formula: alpha divided by size", forward, forward.replace("alpha *", "alpha / size *")
    yield "norm, formula: k + 1", forward, forward.replace("k +", "k + 1 +")
    yield "norm, formula: beta 0.5", "return root * root.sqrt()", "return root"
    yield "norm, formula: one map less", "for offset in range(1, size):", "for offset in range(1, size - 1):"
    yield "norm, formula: no window in the gradient", "(2 * alpha * beta) * wide", "0 * wide"
    yield "norm, formula: half of the window's gradient", "(2 * alpha * beta)", "(alpha * beta)"
    yield "norm, blocks: half of the window's gradient", "value=-2 * alpha * beta", "value=-alpha * beta"
    yield "norm, blocks: k not spread", "squares.new_tensor(k / self.size)", "squares.new_tensor(k)"
    yield (
        "norm, kernel: both towers' maps",
        "x.numel() // maps, maps, size",
        "x.numel() // x.shape[1], x.shape[1], size",
    )
    yield "within a channel: average instead of sum", ", divisor_override=1", ""
    yield "within a channel: k = 2", "(alpha, beta, 1.0)", "(alpha, beta, 2.0)"
    yield "norm, layer: alpha x 10", "alpha=c.alpha", "alpha=10 * c.alpha"
    yield "norm, layer: alpha divided by size", "alpha=c.alpha", "alpha=c.alpha / c.size"
    yield "norm, layer: alpha not divided by size", "alpha=c.alpha", "alpha=c.alpha * c.size"
    yield "norm, layer: beta", "beta=c.beta, k", "beta=0.5, k"
    yield "norm, layer: k", "k=c.k", "k=1.0"
    yield "norm, layer: size", "size=c.size", "size=c.size + 2"
    yield "norm, layer: across both towers", "maps=self.channels", "maps=None"
    yield "within a channel, layer: alpha x 10", "alpha=c.within_channel_alpha", "alpha=10 * c.within_channel_alpha"
    yield "within a channel, layer: the other alpha", "alpha=c.within_channel_alpha", "alpha=c.alpha"
    yield "within a channel, layer: size", "size=c.within_channel_size", "size=c.within_channel_size - 2"
    yield "within a channel, layer: beta", "beta=c.beta)", "beta=1.0)"


def of_kernels() -> Iterator[Change]:
    """trainer/model/kernels/kernels.cpp: the same formulas, and the update."""
    yield "norm, kernel: alpha x 10", "std::sqrt(1 / (k + alpha *", "std::sqrt(1 / (k + 10 * alpha *"
    yield "norm, kernel: the gradient's factor", "W(1.5 * norm.alpha)", "W(2 * norm.alpha)"
    yield "norm, kernel: no ReLU", "return rectify && value < 0 ? W(0) : value;", "return value;"
    yield "update, kernel: no momentum", "v[i] = m * v[i] - d", "v[i] = -d"
    yield "update, kernel: no decay", "- d * w[i] - r", "- r"
    yield (
        "update, kernel: torch's rule",
        "- d * w[i] - r * g[i];\n        w[i] += v[i];",
        "- g[i];\n        w[i] += r * v[i];",
    )


def of_gpu_layers() -> Iterator[Change]:
    """trainer/model/gpu_layers.py: the same sums otherwise."""
    shifted = "Blocks(stride, window * stride - kernel, window, window)"
    yield "blocks: zeros before the window", "Blocks(stride, 0, window, window)", shifted
    yield "blocks: a block more", "// stride + window for side", "// stride + window + 1 for side"
    yield (
        "dense towers: each sees the other's",
        "in whole.chunk(groups, dim=1)",
        "in reversed(whole.chunk(groups, dim=1))",
    )
    yield "towers apart: a bias that nobody adds", "whole if x.bias is None else", "whole if True else"
    yield "copy in bfloat16: never made anew", "elif found.version != parameter._version:", "elif False:"


def of_gpu_passes() -> Iterator[Change]:
    """trainer/model/layers.py: how often a GPU passes over maps."""
    yield "towers apart: together between two layers", "parts=num_towers if is_grouped else 1", "parts=1"


def of_pooling() -> Iterator[Change]:
    """trainer/model/pooling.py: what is one pass on a GPU."""
    yield "pooling: no ReLU behind it", "is_relu or is_after)", "is_relu)"


def of_gpu_norm() -> Iterator[Change]:
    """trainer/model/kernels/triton_norm.py, by Triton's interpreter."""
    yield "norm, GPU: the gradient's factor", "1.5 * alpha * values", "2 * alpha * values"
    yield "norm, GPU: no ReLU in the gradient", "tl.where(values[j] <= 0, 0.0, change)", "change"


def of_gpu_pool() -> Iterator[Change]:
    """trainer/model/kernels/triton_pool.py."""
    yield "pool, GPU: the last of those that tie", "tl.where(value > best, i", "tl.where(value >= best, i"
    yield "pool, GPU: a gradient through zeros", "tl.where(best <= 0, NOTHING", "tl.where(best < 0, NOTHING"


def of_gpu_tile() -> Iterator[Change]:
    """trainer/model/kernels/triton_tile.py, by Triton's interpreter."""
    yield "towers, GPU: both are a's", "tl.where(tower == 0, first, second)", "first"
    yield "towers, GPU: a's biases for both", "tl.expand_dims(tower * MAPS + group", "tl.expand_dims(group"
    yield "bias, GPU: one warp's gradient", "tl.sum(pieces, 0), mask", "tl.max(pieces, 0), mask"


def of_gpu_blocks() -> Iterator[Change]:
    """trainer/model/kernels/triton_blocks.py."""
    yield "blocks, GPU: zeros above forgotten", "* SIDE - BEFORE + value // PIECE", "* SIDE + value // PIECE"
    yield "blocks, GPU: a line runs into the next", " & (place >= 0) & (place < LINE)", ""


def of_gpu_dropout() -> Iterator[Change]:
    """trainer/model/kernels/triton_dropout.py."""
    yield "dropout, GPU: tower b drops as a", "start_b + tl.load(more_b)", "start_a + tl.load(more_a)"
    yield "dropout, GPU: rows of the batch's beginning", "(row + first).to(tl.int64)", "row.to(tl.int64)"
    yield "dropout, GPU: a gradient through zeros", "tl.where(value <= 0, 0.0, slope", "tl.where(value < 0, 0.0, slope"


def of_gpu_update() -> Iterator[Change]:
    """trainer/model/kernels/triton_update.py."""
    yield "update, GPU: no decay", "- decay * weight - rate", "- rate"
    yield "update, GPU: rates of the first", "(*_addresses(member), number)", "(*_addresses(member), 0)"
    yield "update, GPU: the old weights are copied", "at, weight.to(tl.bfloat16)", "at, velocity.to(tl.bfloat16)"


def of_precision() -> Iterator[Change]:
    """trainer/precision.py: what auto comes to."""
    yield "auto: bf16 everywhere", "not flags.isdisjoint(BF16_FLAGS)", "True"
    yield "auto: a run does not keep it", "precision=before.train.precision", 'precision="bf16"'
    yield "auto: oneDNN's variable", " and not NARROWED.fullmatch(held)", ""


def of_crossing() -> Iterator[Change]:
    """trainer/parallel/crossing.py: halves that cross, and their gradients."""
    yield "crossing: tower b's half first", 'return (a, b) if self.link.tower == "a" else (b, a)', "return a, b"
    yield "crossing: no remote half", "halves.add_product(y, remote, weight_remote)", "pass"
    yield (
        "crossing: the other tower's gradient not added",
        "grad_local.add_(halves.link.wait(transfer))",
        "halves.link.wait(transfer)",
    )
    yield (
        "crossing: gradient sent back is zero",
        "halves.grad_input(grad, remote, weight_remote)",
        "0 * halves.grad_input(grad, remote, weight_remote)",
    )
    yield (
        "crossing: weight gradient's halves swapped",
        "columns_local, columns_remote =",
        "columns_remote, columns_local =",
    )
    yield "crossing: bias gradient of one image", "grad.sum([0, ", "grad[:1].sum([0, "
    yield (
        "crossing: fc8's gradient for tower b is zero",
        "return link.wait(transfer), None",
        "return 0 * link.wait(transfer), None",
    )
    yield "crossing: gradient cut at the wrong side", "before = self.conv.zeros[0]", "before = self.conv.zeros[1]"
    yield "tower: strides", SHAPE, SHAPE.replace("strides[index]", "strides[index] + 1")
    yield "tower: zeros shifted", SHAPE, SHAPE.replace("config.paddings[index]", "config.paddings[index][::-1]")
    for layer in ("conv3", "fc6", "fc7"):
        nth = 1 if layer == "conv3" else 2
        old = "layer not in config.crossings" if nth == 1 else "if layer not in self._config.crossings"
        yield f"tower: {layer} sees its own half", old, f'{old} or layer == "{layer}"'


def of_comm_dtype() -> Iterator[Change]:
    """trainer/parallel/crossing.py: in which numbers halves travel."""
    yield "crossing: comm_dtype ignored", "COMM_DTYPES[config.train.comm_dtype]", "None"


def of_config() -> Iterator[Change]:
    """trainer/config.py: values that most recipes leave alone, and map sizes."""
    yield (
        "default: pool 2 px",
        'pool_px: Annotated[int, Limits(1, unit="px")] = 3',
        'pool_px: Annotated[int, Limits(1, unit="px")] = 2',
    )
    yield (
        "default: pool stride 1",
        'pool_stride: Annotated[int, Limits(1, unit="px")] = 2',
        'pool_stride: Annotated[int, Limits(1, unit="px")] = 1',
    )
    yield "default: pools round up", "pool_ceil: bool = False", "pool_ceil: bool = True"
    for layer in ("conv3", "fc6", "fc7"):
        crossings = '("conv3", "fc6", "fc7", "fc8")'
        left = crossings.replace(f'"{layer}", ', "")
        yield f"default: {layer} does not cross", f"= {crossings}", f"= {left}"
    yield (
        "default: tanh",
        'activation: Literal["relu", "tanh"] = "relu"',
        'activation: Literal["relu", "tanh"] = "tanh"',
    )
    yield "default: biases have a schedule of their own", '"steps"] = "same"', '"steps"] = "constant"'
    yield (
        "default: warm-up",
        'warmup_epochs: Annotated[float, Limits(0, unit="epochs")] = 0.0',
        'warmup_epochs: Annotated[float, Limits(0, unit="epochs")] = 1.0',
    )
    yield "default: comm_dtype", '"bf16"] = "same"', '"bf16"] = "fp16"'
    yield "default: precision", '"bf16"] = "fp32"', '"bf16"] = "bf16"'
    yield (
        "default: batches in pieces",
        'accumulate: Annotated[int, Limits(1, unit="pieces")] = 1',
        'accumulate: Annotated[int, Limits(1, unit="pieces")] = 2',
    )
    yield "map sizes: no stride", "// self.strides[i] + 1", "+ 1"
    yield "pooled side: never rounded up", "over = self.pool_stride - 1 if self.pool_ceil else 0", "over = 0"


GROUPS = (
    ("trainer/model/layers.py", (NARROW, FOLLOWS, ALEXNET, RECIPES), of_layers),
    ("trainer/model/layers.py", (NARROW, MASKS, UNITS, DROPS, ALEXNET), of_dropout),
    ("trainer/model/alexnet.py", (NARROW, UNITS, LOSS, ALEXNET), of_alexnet),
    ("trainer/model/alexnet.py", (GAUSSIAN, ALIKE, ALEXNET), of_start),
    ("trainer/model/response_norm.py", (NARROW, BY_HAND, NORM, KERNELS), of_response_norm),
    ("trainer/model/kernels/kernels.cpp", (NORM, OPTIMIZER, KERNELS), of_kernels),
    ("trainer/model/gpu_layers.py", (GPU_LAYERS,), of_gpu_layers),
    ("trainer/model/layers.py", (GPU_PASSES,), of_gpu_passes),
    ("trainer/model/pooling.py", (GPU_LAYERS,), of_pooling),
    ("trainer/model/kernels/triton_norm.py", (INTERPRETED,), of_gpu_norm),
    ("trainer/model/kernels/triton_pool.py", (INTERPRETED,), of_gpu_pool),
    ("trainer/model/kernels/triton_tile.py", (INTERPRETED,), of_gpu_tile),
    ("trainer/model/kernels/triton_blocks.py", (INTERPRETED,), of_gpu_blocks),
    ("trainer/model/kernels/triton_dropout.py", (INTERPRETED,), of_gpu_dropout),
    ("trainer/model/kernels/triton_update.py", (INTERPRETED,), of_gpu_update),
    ("trainer/precision.py", (PRECISION,), of_precision),
    ("trainer/parallel/crossing.py", (CROSSING, EQUALITY, OVERLAP), of_crossing),
    ("trainer/parallel/crossing.py", (f"{OVERLAP}::test_variants_equal_serial",), of_comm_dtype),
    ("trainer/config.py", (RECIPES, ALEXNET), of_config),
)
