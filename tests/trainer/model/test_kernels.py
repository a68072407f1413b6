"""The compiled kernels against float64 formulas, and every way in which they cannot be had."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import OptimizerConfig
from trainer.model import kernels
from trainer.model.kernels import cpp
from trainer.model.response_norm import response_norm
from trainer.training.optimizer import PaperSGD, Rates

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(kernels.load() is None, reason="no C++ compiler here, see the line above")
CONSTANTS = {"alpha": 0.2, "beta": 0.75, "k": 2.0}


def by_formula(x: Tensor, size: int, maps: int, rectify: bool) -> Tensor:
    """The paper's formula in float64, tower by tower, as it is written."""
    out = []
    for part in x.double().split(maps, dim=1):
        value = part.relu() if rectify else part
        half = size // 2
        sums = functional.pad(value**2, (0, 0, 0, 0, half, half)).unfold(1, size, 1).sum(-1)
        out.append(value * (CONSTANTS["k"] + CONSTANTS["alpha"] * sums) ** -0.75)
    return torch.cat(out, dim=1)


def terms_of_gradient(x: Tensor, weights: Tensor, size: int, maps: int, rectify: bool) -> Tensor:
    """The gradient is a difference; the sizes of its two terms: their roundings do not cancel."""
    out = []
    for part, g in zip(x.detach().double().split(maps, 1), weights.double().abs().split(maps, 1), strict=True):
        value = part.relu() if rectify else part.abs()
        half = size // 2
        border = (0, 0, 0, 0, half, half)
        d = CONSTANTS["k"] + CONSTANTS["alpha"] * functional.pad(value**2, border).unfold(1, size, 1).sum(-1)
        products = functional.pad(g * value * d**-1.75, border).unfold(1, size, 1).sum(-1)
        out.append(g * d**-0.75 + 1.5 * CONSTANTS["alpha"] * value * products)
    return torch.cat(out, dim=1)


def gradient_of(y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad((y * weights.to(y.dtype)).sum(), x)[0]


@needs_compiler
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_the_formulas(dtype: torch.dtype, size: int, rectify: bool) -> None:
    """Odd shapes, windows wider than the maps, both towers in a tensor, enough rows for two threads.

    On the way to a value lie at most 14 roundings of float32 (bfloat16 is summed in it) or float64, 36 to the terms of
    a gradient; then bfloat16 is rounded to. The reference, in float64, has as many.
    """
    wide = 2.0 ** (-53 if dtype == torch.float64 else -24)
    last = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    for shape, maps in (((1, 1, 1, 1), 1), ((3, 4, 5, 3), 2), ((5, 18, 7, 3), 9), ((2, 96, 29, 31), 48)):
        x = (torch.randn(shape) * 3).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        weights = torch.randn(shape).to(dtype)
        assert kernels.of(x) is not None
        y = response_norm(x, size=size, maps=maps, rectify=rectify, **CONSTANTS)
        same = x.detach().double().requires_grad_()
        exact = by_formula(same, size, maps, rectify)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert ((y.double() - exact).abs() <= (2 * 14 * wide + last) * exact.abs()).all()
        found = gradient_of(y, x, weights)
        assert found.is_contiguous(memory_format=torch.channels_last)
        wanted = gradient_of(exact, same, weights)
        most = 2 * 36 * wide * terms_of_gradient(x, weights, size, maps, rectify)
        assert ((found.double() - wanted).abs() <= most + last * (wanted.abs() + most)).all()


@needs_compiler
def test_gradcheck_with_the_rectifier() -> None:
    """Finite differences; no value lies near the kink."""
    x = torch.randn(2, 7, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    x = torch.where(x.abs() < 0.01, 0.5, x).to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: response_norm(v, size=5, rectify=True, **CONSTANTS), (x,))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_comes_out_as_from_torch(bad: float, dtype: torch.dtype) -> None:
    """One bad number in x or in the gradient: NaN in the same places as from the formulas, forward and backward."""
    for in_gradient in (False, True):
        x, g = torch.randn(2, 2, 12, 3, 3).to(dtype).unbind()
        (g if in_gradient else x)[1, 5, 1, 1] = bad
        results = []
        for layout in (torch.contiguous_format, torch.channels_last):  # the first is done by torch operations
            leaf = x.clone(memory_format=layout).requires_grad_()
            y = response_norm(leaf, size=5, **CONSTANTS)
            y.backward(g)
            results.append((y.isfinite(), leaf.grad.isfinite()))
        assert not (results[1][0].all() and results[1][1].all())
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
def test_the_number_of_threads_changes_no_bit() -> None:
    """Rows and elements are independent."""
    before, results = torch.get_num_threads(), []
    x = torch.randn(2, 96, 31, 29).to(memory_format=torch.channels_last)
    w, v, g = torch.randn(3, 100_003)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf, weights, velocity = x.clone().requires_grad_(), w.clone(), v.clone()
            y = response_norm(leaf, size=5, maps=48, **CONSTANTS)
            y.backward(x)
            kernels.load().update(weights, velocity, g, (0.9, 0.1, 0.2), None)
            results.append((y.detach(), leaf.grad, weights, velocity))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def layers(dtype: torch.dtype) -> nn.Module:
    """Weights in both layouts, and of no elements."""
    net = nn.Sequential(nn.Conv2d(6, 8, 3, dtype=dtype), nn.Linear(50, 30, dtype=dtype))
    net[0].to(memory_format=torch.channels_last)
    return net


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["alike", "gradient otherwise"])
def test_update_equals_torch_operations(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps with a rate drop; a gradient of another layout goes the way of torch operations."""
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(kernels, "of", lambda _: None)
        torch.manual_seed(0)
        net = layers(dtype)
        optimizer = PaperSGD(net.named_parameters(), OptimizerConfig(weight_decay=0.1))
        for step in range(4):
            optimizer.set_rates(Rates(0.1 if step < 2 else 0.01, 0.2))
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
                if layout != "alike" and parameter.dim() == 4:
                    parameter.grad = parameter.grad.contiguous()
                    assert parameter.grad.stride() != parameter.stride()
            optimizer.step()
        found.append([*net.parameters(), *(optimizer.velocity(parameter) for parameter in net.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_compiler
def test_a_guard_of_zero_leaves_everything_as_it_was() -> None:
    """Weights and velocities; a guard of 1 lets the step through; autograd notices a step through the kernel."""
    net = layers(torch.float32)
    optimizer = PaperSGD(net.named_parameters(), OptimizerConfig())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.step(guard=torch.tensor(0.0))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(not optimizer.velocity(parameter).any() for parameter in net.parameters())
    versions = [parameter._version for parameter in net.parameters()]
    optimizer.step(guard=torch.tensor(1.0))
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(old < parameter._version for old, parameter in zip(versions, net.parameters(), strict=True))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that is not there yet, and a compiler that copies a library made before and counts its calls."""
    made = tmp_path / "made.so"
    plain = [flag for flag in cpp.FLAGS if not flag.startswith(("-O", "-march"))]
    command = [*cpp._compiler(), *plain, str(cpp.SOURCE), "-o", str(made)]
    subprocess.run(command, check=True)
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho >> {tmp_path}/calls\n'
        f'for last; do :; done\ncp {made} "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "twotower"


def calls(cache: Path) -> int:
    """How often the compiler has compiled."""
    return len((cache.parent.parent / "calls").read_text().splitlines())


@needs_compiler
def test_a_library_is_kept_and_a_damaged_or_foreign_one_is_made_again(cache: Path) -> None:
    """Torn in the middle; empty; another user's; something else with a right digest."""
    foreign = b"\x7fELF of another machine"
    cache.mkdir(mode=0o700, parents=True)
    library = cache / f"kernels-{cpp._fingerprint(cpp._compiler())}.so"
    library.write_bytes(foreign + hashlib.sha256(foreign).digest())
    assert kernels.load.__wrapped__() and kernels.load.__wrapped__() and calls(cache) == 1
    whole = library.read_bytes()
    for count, content in enumerate((whole[:5000], b""), start=2):
        library.unlink()  # not overwritten: this process has it mapped
        library.write_bytes(content)
        assert kernels.load.__wrapped__() and calls(cache) == count
        assert library.read_bytes() == whole
    if os.getuid() == 0:
        os.chown(library, 12345, 12345)
        assert kernels.load.__wrapped__() and calls(cache) == count + 1
        assert library.stat().st_uid == 0
    assert list(cache.iterdir()) == [library]


@needs_compiler
def test_a_library_that_others_may_exchange_is_not_loaded(cache: Path) -> None:
    """Others may write into its folder, or to it, or it is a link: made again, and loaded from a folder of our own."""
    assert kernels.load.__wrapped__() and calls(cache) == 1
    (library,) = cache.iterdir()
    library.chmod(0o722)
    assert kernels.load.__wrapped__() and calls(cache) == 2
    kept = library.rename(cache.parent / "elsewhere.so")
    library.symlink_to(kept)
    assert kernels.load.__wrapped__() and calls(cache) == 3
    assert not library.is_symlink()
    cache.chmod(0o777)
    assert kernels.load.__wrapped__() and calls(cache) == 4
    assert kernels.load.__wrapped__() and calls(cache) == 5


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_a_compilation_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where the folder should be; no home folder at all."""
    cache.parent.write_text("")
    assert kernels.load.__wrapped__() and calls(cache) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert kernels.load.__wrapped__() and calls(cache) == 2


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "no C++ compiler: no-such-compiler not found"),
        ("false", "false ends with status 1"),
        (
            "/bin/sh -c 'echo file.cpp:1: error: what is this >&2; exit 3'",
            "ends with status 3: file.cpp:1: error: what",
        ),
        (None, "no C++ compiler: c++, g++, clang++ not found"),
    ],
)
def test_without_a_compiler_torch_does_it_and_one_line_says_so(
    compiler: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The reason, and results within rounding of the compiled ones."""
    x = torch.randn(2, 18, 9, 7).to(memory_format=torch.channels_last)
    compiled = response_norm(x.clone(), size=5, maps=9, rectify=True, **CONSTANTS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler or "")
    monkeypatch.setenv(kernels.SWITCH, "")
    if compiler is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    load = kernels.load
    found = load.__wrapped__()
    said = capsys.readouterr().err
    assert found is None and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(kernels, "load", lambda: None)
    assert kernels.environment("cpu") == {kernels.SWITCH: "off"}  # processes started from here need not try, nor say
    with monkeypatch.context() as switched:
        switched.setenv(kernels.SWITCH, "off")
        assert load.__wrapped__() is None and not capsys.readouterr().err
    assert kernels.describe("cpu") == "torch"
    assert kernels.of(x) is None
    torch.testing.assert_close(response_norm(x, size=5, maps=9, rectify=True, **CONSTANTS), compiled)


@needs_compiler
def test_a_second_openmp_runtime_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Both would keep a thread a core."""
    monkeypatch.setenv(kernels.SWITCH, "")
    answers = iter([{"/lib/libgomp.so.1"}, {"/lib/libgomp.so.1", "/lib/libiomp5.so"}])
    monkeypatch.setattr(cpp, "openmp_runtimes", lambda: next(answers))
    assert kernels.load.__wrapped__() is None
    assert "a second OpenMP runtime would be loaded, /lib/libiomp5.so" in capsys.readouterr().err


FRESH = """
import torch
from trainer.model import kernels
from trainer.model.kernels import cpp
from trainer.model.response_norm import response_norm
torch.set_num_threads(2)
x = torch.randn(2, 96, 55, 55).to(memory_format=torch.channels_last)
response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0, maps=48)
print(kernels.describe("cpu"), len(cpp.openmp_runtimes()))
"""


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="OpenMP runtimes are counted on Linux")
def test_two_processes_may_build_at_once_and_have_one_openmp_runtime_each(cache: Path) -> None:
    """Both find no library; the runtime is torch's own libgomp."""
    start = {"cwd": ROOT, "env": os.environ, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", FRESH], **start) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == ["C++ 1", "C++ 1"]
    (library,) = cache.iterdir()
    assert oct(cache.stat().st_mode & 0o777) == "0o700"
    assert cpp._is_complete(library)
