"""``train.precision = "auto"``: what it comes to on which machine, where that is written down, and who keeps it."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_run import RECIPE
from trainer import precision
from trainer.config import load_config
from trainer.precision import has_bf16, image_dtype, keep_precision, resolve_precision, slow_warning

WITH, WITHOUT = frozenset({"avx512f", "avx512_bf16"}), frozenset({"avx2", "avx512f"})


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ({"avx2"}, {}, False),
        ({"avx512f", "avx512_bf16"}, {}, True),
        ({"amx_bf16"}, {}, True),
        ({"asimd", "bf16"}, {}, True),  # ARM
        (set(), {}, False),  # no /proc/cpuinfo
        ({"avx512_bf16"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ({"avx512_bf16"}, {"DNNL_MAX_CPU_ISA": "avx512_core_vnni"}, False),
        ({"avx512_bf16"}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ({"avx512_bf16"}, {"ONEDNN_MAX_CPU_ISA": ""}, True),
    ],
)
def test_which_processors_have_instructions(flags: set[str], environment: dict[str, str], expected: bool) -> None:
    assert has_bf16(frozenset(flags), environment) == expected


@pytest.mark.parametrize(("flags", "fast"), [(WITH, "bf16"), (WITHOUT, "fp32")])
def test_auto_is_what_the_machine_is_fast_in(flags, fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that was asked for stays; where it is slow, one sentence says so, with the factor."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(precision, "processor_flags", lambda: flags)
    for given in ("auto", "fp32", "tf32", "bf16"):
        config = load_config(None, [f"train.precision={given}"])
        resolved = resolve_precision(config, "cpu")
        assert resolved.train.precision == (fast if given == "auto" else given)
        warning = slow_warning(resolved, "cpu")
        assert bool(warning) == (given == "bf16" and fast == "fp32") and ("0.06 times" in warning) == bool(warning)
        kept = keep_precision(config, load_config(None, ["train.precision=bf16"]))
        assert kept.train.precision == ("bf16" if given == "auto" else given)


def test_images_are_rounded_by_the_loader_where_a_gpus_first_layer_would() -> None:
    """A CPU's loader is the same in every precision."""
    for name, device, wanted in (
        ("bf16", "cuda:1", torch.bfloat16),
        ("fp32", "cuda:0", torch.float32),
        ("tf32", "cuda:0", torch.float32),
        ("bf16", "cpu", torch.float32),
    ):
        assert image_dtype(name, device) == wanted


def test_the_flags_are_those_of_this_processor() -> None:
    assert precision.processor_flags() or not Path("/proc/cpuinfo").exists()


def test_a_run_writes_down_what_auto_came_to_and_keeps_it(
    trainer, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun where bf16 is slow, continued where it is fast: the rest of the run is computed as the first part was."""
    run = tmp_path / "run"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(precision, "processor_flags", lambda: WITHOUT)
    words = ("train", *RECIPE, "--data", tiny_data, "--run", run, "--device", "cpu", "--set", "train.precision=auto")
    assert trainer(*words)[0] == 0
    assert 'precision = "fp32"' in (run / "config.toml").read_text()
    assert json.loads((run / "environment.json").read_text())["precision"] == "fp32"
    monkeypatch.setattr(precision, "processor_flags", lambda: WITH)
    status, _, error = trainer(*words, "--resume", "auto", "--set", "train.epochs=3")
    assert status == 0 and "warning" not in error
    assert 'precision = "fp32"' in (run / "config.toml").read_text()
    assert json.loads((run / "environment.json").read_text())["resumed"][0]["precision"] == "fp32"
    status, _, error = trainer(*words, "--resume", "auto", "--set", "train.precision=bf16", "--set", "train.epochs=4")
    assert status == 2 and "train.precision = 'bf16' instead of train.precision = 'fp32'" in error


def test_bf16_by_hand_where_it_is_slow_is_one_warning(
    trainer, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run starts all the same; a dry run says it, too."""
    monkeypatch.setattr(precision, "processor_flags", lambda: WITHOUT)
    words = ("train", *RECIPE, "--data", tiny_data, "--run", tmp_path / "run", "--device", "cpu")
    status, _, error = trainer(*words, "--set", "train.precision=bf16", "--dry-run")
    assert status == 0 and error.count("warning: train.precision = 'bf16', and this processor has no instructions") == 1
