"""Training and testing made wrong: the update, rates, pieces and replicas, top-1, top-5, ten views."""

from collections.abc import Iterator

from tests.mutations import Change

KERNELS = "tests/trainer/model/test_kernels.py"
RECIPES = "tests/trainer/test_recipes.py"
OPTIMIZER = "tests/trainer/training/test_optimizer.py"
PARTIAL = "tests/trainer/training/test_partial_batch.py"
PIECES = "tests/trainer/parallel/test_data_parallel.py::test_accumulation_equals_the_whole_batch"
VERDICTS = "tests/trainer/training/test_verdicts.py"
GRAPHS = "tests/trainer/training/test_step_graph.py"
FAKE_GPU = "tests/trainer/training/test_fake_gpu.py::test_a_run_equals_one_on_the_cpu"
EVALUATE = "tests/trainer/training/test_evaluate.py"
PREDICT = "tests/trainer/inference/test_predict.py"
REPLICAS = "tests/trainer/parallel/test_data_parallel.py"


def of_optimizer() -> Iterator[Change]:
    """trainer/training/optimizer.py: the rule, the rates, the schedules."""
    yield "momentum: 0.5", '{"momentum": config.momentum}', '{"momentum": 0.5}'
    yield "decay: not times the rate", 'group["rate"] * group["weight_decay"]', 'group["weight_decay"]'
    yield "decay: none", "config.weight_decay if are_weights", "0.0 if are_weights"
    yield "decay: biases too", "if are_weights or config.decay_biases else 0.0", "if True else 0.0"
    yield "decay: batch norm's scale too", "parameter.dim() > 1)", 'parameter.dim() > 1 or "norm.weight" in name)'
    yield "rates: weights have the biases'", 'weights if group["are_weights"] else biases', "biases"
    yield "rates: biases have the weights'", 'weights if group["are_weights"] else biases', "weights"
    yield "rates: no layer has its own", 'rates.layers.get(group["layer"],', "{}.get(group['layer'],"
    yield (
        "update, torch: no momentum",
        "torch._foreach_mul_(velocities, momentum)",
        "torch._foreach_mul_(velocities, 0)",
    )
    yield "update, torch: decay's sign", "alpha=-decay", "alpha=decay", 1
    yield "update, torch: rate 1", "gradients, alpha=-rate)", "gradients, alpha=-1)", 1
    yield "update, guarded: decay's sign", "alpha=-decay", "alpha=decay", 2
    yield "update, guarded: rate 1", "gradients, alpha=-rate)", "gradients, alpha=-1)", 2
    yield "update, guarded: velocities move", "(*velocities, *weights), (*found, *moved)", "weights, moved"
    yield "warm-up: none", "min(1.0, epoch / config.warmup_epochs)", "1.0"
    yield "warm-up: of a square", "min(1.0, epoch / config", "min(1.0, epoch**2 / config"
    yield "warm-up: not of the weights", "config.learning_rate * warm", "config.learning_rate"
    yield "warm-up: not of the biases", "config.bias_learning_rate * warm", "config.bias_learning_rate"
    yield "biases start at the weights' rate", "config.bias_learning_rate * warm", "config.learning_rate * warm"
    yield "layer override: an epoch late", "epoch >= override.epoch", "epoch >= override.epoch + 1"
    yield "layer override: after the epoch", "epoch >= override.epoch", "epoch > override.epoch"
    yield (
        "layer override: biases at the layer's own",
        "biases if override.bias_learning_rate is None",
        "override.learning_rate if override.bias_learning_rate is None",
    )
    yield "steps: by the root", "config.gamma ** _passed", "config.gamma ** 0.5 ** _passed"
    yield "steps: after the epoch", "sum(epoch >= mark", "sum(epoch > mark"
    yield "steps: an epoch early", "sum(epoch >= mark", "sum(epoch + 1 >= mark"
    yield (
        "steps: the first only",
        "return sum(epoch >= mark for mark in marks)",
        "return min(1, sum(epoch >= mark for mark in marks))",
    )
    yield "plateau: rates do not fall", "config.gamma**plateaus", "config.gamma"
    yield "log thirds: fifths", "epochs * quarter / 4", "epochs * quarter / 5"
    yield "log thirds: all at once", "epoch) / 3)", "epoch) / 1)"
    yield "biases: halfway at a third", "(epochs / 2,)", "(epochs / 3,)"
    yield "biases: the weights' factor", "config.bias_gamma ** _passed", "config.final_lr_ratio ** -_passed"
    yield "biases: constant falls", '"constant": ()', '"constant": (1.0,)'
    yield "plateau: any fall counts", "best - config.threshold", "best"
    yield "plateau: patience + 1", "waited == config.patience", "waited == config.patience + 1"
    yield "plateau: no most", "min(plateaus, config.max_drops)", "plateaus"
    yield "plateau: waits once", "plateaus, waited = plateaus + 1, 0", "plateaus, waited = plateaus + 1, waited - 1"


def of_step() -> Iterator[Change]:
    """trainer/training/step.py: a batch in pieces and over replicas."""
    yield "pieces: summed", "loss * (size / total)", "loss"
    yield "pieces: replicas summed", "loss * (size / total)", "loss * (size / rows)"
    yield "pieces: all draw the first rows' masks", "first=first + begin", "first=first"
    yield "pieces: replicas draw the same masks", "first=first + begin", "first=begin"
    yield "gradients pile up over steps", "self._net.zero_grad(set_to_none=True)", "pass"
    yield "guard: opens again", "self.guard.mul_(sound)", "self.guard.copy_(sound)"
    yield "guard: never shut", "self.guard.mul_(sound)", "pass"


def of_step_on_a_gpu() -> Iterator[Change]:
    """trainer/training/step.py: what a copy needs that nobody waits for."""
    yield "words: from memory that is not pinned", "found.pin_memory() if", "found if"


def of_told_on_a_gpu() -> Iterator[Change]:
    """trainer/parallel/status.py: what has come."""
    yield "told: read before it has come", "self._event.synchronize()", "pass"


def of_input_on_a_gpu() -> Iterator[Change]:
    """pipeline/loader/net_input.py: what differs between images follows without a wait."""
    yield "labels: from memory that is not pinned", "host.pin_memory().to(device", "host.to(device"


def of_step_graph() -> Iterator[Change]:
    """trainer/training/step_graph.py: what changes from replay to replay."""
    numbers = "captured.numbers.copy_(on_host(self._numbers(inputs), work.device), non_blocking=True)"
    yield "graph: dropout of the capture", numbers, "pass"
    yield "graph: images of the capture", "place.copy_(tensor, non_blocking=True)", "pass"
    yield "graph: rates of the capture", "work.optimizer.send()", "pass"
    yield "graph: gradients of another step", "parameter.grad = gradient", "pass"
    yield "graph: partial batches too", "len(inputs.labels) != self._rows", "False"
    yield "graph: frozen layers go on", "if moving != self._moving:", "if False:"
    yield "graph: a capture that failed keeps the stream", "torch.cuda.set_stream(current)", "pass"
    yield "graph: other kernels warm up", "inputs = self._in_numbers(inputs)[1]", "pass"
    yield "graph: a capture may be collected in", "gc.disable()", "pass"


def of_loop() -> Iterator[Change]:
    """trainer/training/loop.py: rates at each step."""
    yield "run: a checkpoint before the last steps are known", "stop = self._settle() or stop", "pass"
    yield "run: rates of the evaluation before", "self.plateaus = self._known_plateaus()\n        if", "if"
    yield "run: rates never set", "self.optimizer.set_rates(rates)", "pass"
    yield (
        "run: whole epochs only",
        "self.config.train, self.step / self.steps_per_epoch",
        "self.config.train, self.step // self.steps_per_epoch",
    )
    yield (
        "run: dropout of the first step always",
        "self._notes(batch).words, self.step)",
        "self._notes(batch).words, 0)",
    )


def of_mesh() -> Iterator[Change]:
    """trainer/parallel/mesh.py: the sum over replicas."""
    total = "dist.all_reduce(wire, group"
    yield "replicas: largest gradient", total, "dist.all_reduce(wire, op=dist.ReduceOp.MAX, group"
    yield "replicas: averaged once more", total, "dist.all_reduce(wire.div_(2), group"


def of_evaluate() -> Iterator[Change]:
    """trainer/training/evaluate.py: top-1, top-5, ten views."""
    mean = 'shares.unflatten(0, (-1, 10)).mean(1) if views == "ten"'
    logits = 'functional.softmax(output.float().unflatten(0, (-1, 10)).mean(1), dim=1) if views == "ten"'
    yield "top-5: four", "topk(min(5,", "topk(min(4,"
    yield "top-5: six", "topk(min(5,", "topk(min(6,"
    yield "top-1: second", "predicted=ranked.indices[:, 0]", "predicted=ranked.indices[:, 1]"
    yield "ten views: logits averaged", mean, logits
    yield "ten views: the first only", mean, mean.replace(".mean(1)", "[:, 0]")
    yield "ten views: the surest", mean, mean.replace(".mean(1)", ".amax(1)")
    yield "evaluation in training mode", "net.eval()\n    for", "net.train()\n    for"
    yield "net stays in testing mode", "net.train(was_training)", "pass"


def of_predict() -> Iterator[Change]:
    """trainer/inference/predict.py."""
    yield "prediction: ten views, the first only", ".mean(1).cpu()", "[:, 0].cpu()"


GROUPS = (
    ("trainer/training/optimizer.py", (OPTIMIZER, RECIPES, KERNELS, GRAPHS), of_optimizer),
    ("trainer/training/step.py", (VERDICTS, PIECES, REPLICAS), of_step),
    ("trainer/training/step.py", (FAKE_GPU,), of_step_on_a_gpu),
    ("trainer/parallel/status.py", (FAKE_GPU,), of_told_on_a_gpu),
    ("pipeline/loader/net_input.py", (FAKE_GPU,), of_input_on_a_gpu),
    ("trainer/training/step_graph.py", (GRAPHS,), of_step_graph),
    ("trainer/training/loop.py", (VERDICTS, f"{PARTIAL}::test_a_run_by_hand"), of_loop),
    ("trainer/training/evaluate.py", (EVALUATE,), of_evaluate),
    ("trainer/inference/trained_net.py", (PREDICT,), of_predict),
    ("trainer/parallel/mesh.py", (REPLICAS,), of_mesh),
)
