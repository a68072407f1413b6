"""The floors of the house, read from the syntax trees: nothing is imported to find out."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "trainer", "cluster", "twotower")
# From the ground up: a room imports from its own floor and those below it.
FLOORS = {
    "pipeline": (
        "errors",
        "signals",
        "pictures",
        "raw_images",
        "addresses",
        "files",
        "progress",
        "config",
        "record_checks",
        "index_checks",
        "manifest",
        "statistics_file",
        "quarantine",
        "sources",
        "preparation",
        "inspection",
        "loader",
        "commands",
    ),
    "trainer": (
        "errors",
        "stopping",
        "config_toml",
        "config",
        "precision",
        "model",
        "parallel",
        "training",
        "planning",
        "report",
        "inference",
        "experiments",
        "bench",
        "guesses",
        "train_command",
        "cli",
    ),
    "twotower": (
        "linux_only",
        "processes",
        "addresses",
        "words",
        "untrusted",
        "typed",
        "private",
        "meeting",
        "terminal",
        "command_line",
        "locks",
        "version",
        "verbosity",
        "fields",
        "listeners",
    ),
    "cluster": ("errors", "jobs", "local", "training", "host_checks", "doctor", "ray_up", "commands", "deploy"),
}
SEEN_OF_PIPELINE = ("loader", "manifest", "config", "errors")  # by the trainer
# Who may know of what, as prefixes of modules.
KNOW = {
    "torch.distributed": (
        "trainer.parallel",
        "trainer.bench",
        "trainer.planning.scale",
    ),  # scale: a fake group, to count
    "ray": ("pipeline.preparation.ray_run", "cluster.jobs", "cluster.training"),
    "nvidia.dali": ("pipeline.loader.graph",),
    "torch": ("trainer", "pipeline.loader", "pipeline.preparation.image"),
    "trainer": ("trainer",),
    "cluster": ("cluster",),
    "pipeline": ("pipeline", "trainer"),
    "wandb": ("trainer.training.loggers.wandb",),
    "mlflow": ("trainer.training.loggers.mlflow",),
}
GROUND = "twotower"  # imports nothing of ours, nor any library


def module_of(path: Path) -> str:
    """``trainer.model.alexnet`` of trainer/model/alexnet.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported_modules(path: Path) -> set[str]:
    """Every dotted name that a file imports, at any depth of the file: ``a.b.c`` of ``from a.b import c``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house uses absolute ones"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below it."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def floor_of(name: str) -> int | None:
    """The floor of a module of ours; None for a package's own head and its entry point."""
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return FLOORS[package].index(room) if room in FLOORS[package] else None


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_resolves_inside_the_repository(package: str) -> None:
    """Three of the names are also names of packages on the public index."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / package / "__init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_a_floor(package: str) -> None:
    """No file outside the plan: rooms, and the entry point above them all."""
    rooms = {name.split(".")[1] for name in FILES if name.startswith(f"{package}.")}
    assert rooms - {"__main__"} == set(FLOORS[package])


@pytest.mark.parametrize("name", FILES)
def test_every_arrow_points_down(name: str) -> None:
    """A module imports from its own room and from floors below; so there is no circle between rooms."""
    own, package = floor_of(name), name.partition(".")[0]
    for imported in imported_modules(FILES[name]):
        theirs = floor_of(imported) if within(imported, (package,)) else None
        if own is not None and theirs is not None:
            assert theirs <= own, f"{name} imports {imported}, which stands above it"


@pytest.mark.parametrize("name", FILES)
def test_who_may_know_of_what(name: str) -> None:
    """Processes only in parallel/, Ray and DALI in one place each, and no package above its own."""
    for imported in imported_modules(FILES[name]):
        for library, rooms in KNOW.items():
            if within(imported, (library,)):
                assert within(name, rooms), f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(GROUND)])
def test_the_ground_stands_on_nothing(name: str) -> None:
    """What all packages share costs no import: Python's own library only."""
    roots = {imported.partition(".")[0] for imported in imported_modules(FILES[name])}
    assert roots <= sys.stdlib_module_names | {GROUND}, roots


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("trainer")])
def test_the_trainer_sees_five_rooms_of_the_pipeline(name: str) -> None:
    """The data set's record, batches, their settings and errors; and the lock of a folder, one for both."""
    seen = {imported for imported in imported_modules(FILES[name]) if within(imported, ("pipeline",))}
    assert all(within(imported, tuple(f"pipeline.{room}" for room in SEEN_OF_PIPELINE)) for imported in seen), seen


def test_there_is_no_circle_of_modules() -> None:
    """Imports at the head of a file, followed to the end, never come back."""
    arrows = {
        name: {m for i in imported_modules(path) for m in (i, i.rpartition(".")[0]) if m in FILES} - {name}
        for name, path in FILES.items()
    }
    done: set[str] = set()

    def follow(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for other in sorted(arrows[name]):
            follow(other, (*trail, name))
        done.add(name)

    for name in FILES:
        follow(name, ())


def test_the_checks_see_what_they_should(tmp_path: Path) -> None:
    """An import inside a function, one of a submodule by its package, and a name that only begins alike."""
    path = tmp_path / "module.py"
    path.write_text(
        "def f():\n    from nvidia.dali import fn\n    import ray.train as t\n    from torch import distributed\n"
    )
    assert imported_modules(path) == {"nvidia.dali.fn", "ray.train", "torch.distributed"}
    assert within("torch.distributed", ("torch.distributed",)) and not within("rays.x", ("ray",))
    assert floor_of("trainer.training.loop") > floor_of("trainer.parallel.mesh")
