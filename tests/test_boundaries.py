"""The import directions of the house, read from the syntax trees: nothing is imported to find out."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("pipeline", "trainer", "cluster")


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every dotted module that a file imports, at any depth of the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house uses absolute ones"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def imports_of(path: Path, package: str) -> set[str]:
    return {name for name in imported_modules(path) if name == package or name.startswith(f"{package}.")}


@pytest.mark.parametrize("package", OURS)
def test_package_resolves_inside_the_repository(package):
    # All three names are also names of packages on PyPI.
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / package / "__init__.py"


@pytest.mark.parametrize("package", OURS)
def test_package_has_files_to_check(package):
    assert python_files(package)


@pytest.mark.parametrize("path", python_files("pipeline"), ids=str)
def test_pipeline_imports_nothing_else_of_ours(path):
    assert not imports_of(path, "trainer") | imports_of(path, "cluster")


@pytest.mark.parametrize("path", python_files("cluster"), ids=str)
def test_cluster_imports_nothing_else_of_ours_and_no_heavy_library(path):
    for package in ("trainer", "pipeline", "torch", "torchvision", "nvidia"):
        assert not imports_of(path, package), package


@pytest.mark.parametrize("path", python_files("trainer"), ids=str)
def test_trainer_uses_only_the_loader_its_stages_the_manifest_and_the_errors_of_pipeline(path):
    assert not imports_of(path, "cluster")
    allowed = ("pipeline.loader.batches", "pipeline.loader.stages", "pipeline.manifest", "pipeline.errors")
    for name in imports_of(path, "pipeline"):
        assert any(name == module or name.startswith(f"{module}.") for module in allowed), name


def test_only_prepare_imports_ray_in_pipeline():
    users = {path.relative_to(ROOT).as_posix() for path in python_files("pipeline") if imports_of(path, "ray")}
    assert users <= {"pipeline/preparation/ray_run.py"}


def test_only_the_loader_imports_dali():
    files = [path for package in OURS for path in python_files(package)]
    users = {path.relative_to(ROOT).as_posix() for path in files if imports_of(path, "nvidia.dali")}
    assert users <= {"pipeline/loader/graph.py"}


def test_trainer_does_not_import_ray():
    # Ray Train calls the trainer's function from cluster/; the trainer itself runs without Ray.
    assert not [path for path in python_files("trainer") if imports_of(path, "ray")]


def test_the_checks_see_an_import_inside_a_function(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from nvidia.dali import fn\n    import ray.train as t\n")
    assert imports_of(path, "nvidia.dali") == {"nvidia.dali.fn"}
    assert imports_of(path, "ray") == {"ray.train"}
