"""What a net begins with, and what goes out of a run, made wrong: initial weights by size, learned weights, exports."""

from collections.abc import Iterator

from tests.mutations import Change

INIT = "tests/trainer/model/test_init.py"
LEARNED = "tests/trainer/training/test_init_from.py"
TORCHVISION = f"{LEARNED}::test_torchvisions_net_computes_the_same_here"
CAFFE = f"{LEARNED}::test_caffes_channels_are_turned_and_its_groups_are_towers"
UNITS = f"{LEARNED}::test_another_unit_and_another_dropout_change_weights_and_not_the_answer"
DENSE = f"{LEARNED}::test_two_groups_become_one_dense_layer"
OF_2012 = f"{LEARNED}::test_a_checkpoint_of_2012_comes_in_the_order_of_the_towers"
ALONE = "tests/trainer/inference/test_export_alone.py"
BOTH = f"{ALONE}::test_both_files_take_bytes_and_say_what_predictions_say"
FIT = "tests/trainer/training/test_fit.py"


def of_start() -> Iterator[Change]:
    """trainer/model/alexnet.py."""
    yield "he: 1 over the inputs", "std = (2 / parameters", "std = (1 / parameters"
    yield "he: by the outputs", '.weight"][0].numel()) ** 0.5', '.weight"][:, 0].numel()) ** 0.5'


def of_frozen() -> Iterator[Change]:
    """trainer/model/layers.py."""
    yield "frozen statistics follow", "super().train(mode and not self.frozen)", "super().train(mode)"


def of_learned() -> Iterator[Change]:
    """trainer/training/init_from.py."""
    yield "learned: units turned round", "weight * deviation if source.unit", "weight / deviation if source.unit"
    yield "learned: dropout's factor forgotten", "    if ratio != 1 and name", "    if ratio == 9 and name"
    yield (
        "learned: groups swapped",
        "return torch.cat([torch.cat([first, first * 0]",
        "return torch.cat([torch.cat([first * 0, first]",
    )


def of_files() -> Iterator[Change]:
    """trainer/model/weight_files.py and the names in it."""
    yield "caffe: channels not turned", '["conv1.weight"].flip(1)', '["conv1.weight"].flip(0).flip(0)'
    yield "torchvision: two layers swapped", "enumerate((0, 3, 6, 8, 10), 1)", "enumerate((0, 3, 8, 6, 10), 1)"


def of_2012() -> Iterator[Change]:
    """trainer/model/files_2012.py."""
    yield "2012: inputs as they are listed", "key=lambda pair: pair[0][-1]", "key=lambda pair: 0"
    yield "2012: not transposed", "np.asarray(matrix, np.float32).T", "np.asarray(matrix, np.float32)"


def of_program() -> Iterator[Change]:
    """trainer/inference/program.py."""
    yield "program: alpha by torch", '"alpha": norm.alpha * norm.size', '"alpha": norm.alpha'
    yield "program: layout", "dims=[0, 3, 1, 2]", "dims=[0, 3, 2, 1]"
    yield "program: factor of dropout", 'dropout", other=testing_factor(model))', 'dropout", other=1.0)'
    yield "program: window's scale", "norm.within_channel_alpha * size**2", "norm.within_channel_alpha * size"


def of_onnx() -> Iterator[Change]:
    """trainer/inference/onnx_graph.py."""
    yield "onnx: layout", "perm=[0, 3, 1, 2]", "perm=[0, 3, 2, 1]"
    yield (
        "onnx: deviation forgotten",
        'graph.constant("input.std", rule.std)',
        'graph.constant("input.std", rule.std * 0 + 1)',
    )


def of_fit() -> Iterator[Change]:
    """trainer/training/fit.py."""
    yield "fit: small crops", "SMALL_CROP = 0.5", "SMALL_CROP = 0.3"
    yield "fit: top-5 of five classes", "TOP5_CLASSES = 6", "TOP5_CLASSES = 5"


GROUPS = (
    ("trainer/model/alexnet.py", (INIT,), of_start),
    ("trainer/model/layers.py", (INIT,), of_frozen),
    ("trainer/training/init_from.py", (UNITS, TORCHVISION, DENSE), of_learned),
    ("trainer/model/weight_files.py", (CAFFE, TORCHVISION), of_files),
    ("trainer/model/files_2012.py", (OF_2012,), of_2012),
    ("trainer/inference/program.py", (BOTH,), of_program),
    ("trainer/inference/onnx_graph.py", (BOTH,), of_onnx),
    ("trainer/training/fit.py", (FIT, "tests/trainer/training/test_evaluate.py"), of_fit),
)
