"""``RUN/trained_on/``: what a run keeps of its data set, so that it needs no data set to predict and to be exported.

The data set's own manifest (class table, image format, fingerprint) and statistics (what the net's input needs), byte
for byte, and read by the data set's own readers, which check them.
"""

from pathlib import Path

from pipeline.errors import DatasetError
from pipeline.manifest import MANIFEST_NAME, STATISTICS_NAME, Manifest, file_sha256, read_manifest, write_atomic
from trainer.errors import RunError
from trainer.training.run_folder import DATA_SET_NAME, read_environment
from twotower.addresses import masked
from twotower.terminal import warn
from twotower.words import pluralize


def keep_data_set(data: Path, folder: Path) -> None:
    """Copies what a run needs of its data set, each file whole or not at all."""
    for name in (MANIFEST_NAME, STATISTICS_NAME):
        write_atomic(folder / name, (data / name).read_bytes())


def kept_manifest(run: Path) -> Manifest | None:
    """The record of the data set that a run was trained on; None where the run keeps none (imported, or an old one).

    Raises:
        RunError: it is damaged.
    """
    folder = run / DATA_SET_NAME
    try:
        if not (folder / MANIFEST_NAME).exists():
            return None
        manifest = read_manifest(folder)
        kept = manifest.files.get(STATISTICS_NAME, {})
        if file_sha256(folder / STATISTICS_NAME) == kept.get("sha256"):
            return manifest
        name, reason = STATISTICS_NAME, "is damaged"
    except DatasetError:
        name, reason = MANIFEST_NAME, "is damaged"
    except OSError as error:
        name, reason = Path(error.filename or folder).name, f"cannot be read ({error.strerror})"
    raise RunError(f"{folder / name} {reason}: copy {name} there from the data set that the run was trained on")


def data_of(run: Path) -> Path:
    """The folder whose preparation, statistics and classes are the run's: its own ``RUN/trained_on``.

    A run made before runs kept it names a folder that may still be there.

    Raises:
        RunError: there is none.
    """
    if kept_manifest(run) is not None:
        return run / DATA_SET_NAME
    noted = read_environment(run).get("data")
    if isinstance(noted, str) and (Path(noted) / MANIFEST_NAME).exists():
        return Path(noted)
    where = f"; the one it was trained on was at {masked(str(noted))}" if noted else ""
    raise RunError(f"{run} keeps no class table and no statistics{where}: name its data set with --data DIR")


def compare_data(run: Path, data: Path, manifest: Manifest) -> Path:
    """Compares a data set with the one that a run was trained on; says aloud where it is another one.

    Returns:
        The folder whose statistics apply: of what the net was trained on, as far as they fit the images.

    Raises:
        RunError: its classes are others: names the first that differs.
    """
    kept = kept_manifest(run)
    if kept is None or kept.fingerprint == manifest.fingerprint:
        return data
    ours, theirs = ([record.name for record in each.classes] for each in (kept, manifest))
    for label, (known, found) in enumerate(zip(ours, theirs, strict=False)):
        if known != found:
            raise RunError(
                f"--data {data}: class {label} is {found!r} there, and {known!r} in the data set that {run} was "
                "trained on; expected the same classes in the same order"
            )
    if len(ours) != len(theirs):
        raise RunError(f"--data {data} has {pluralize(len(theirs), 'class')}, and {run} was trained on {len(ours)}")
    same_size = (kept.image.height_px, kept.image.width_px) == (manifest.image.height_px, manifest.image.width_px)
    subtracted = "the run's" if same_size else "its own, as its images have another size"
    warn(
        f"{data} is not the data set that {run} was trained on; its classes are the same; the statistics "
        f"that the net's input needs are {subtracted}"
    )
    return run / DATA_SET_NAME if same_size else data
