"""ILSVRC-2012 in small: the official archives, devkit, extracted folders and Kaggle's layout, from real photos."""

import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
import skimage.data
from PIL import Image

# ILSVRC id -> WordNet id, not in alphabetical order, as in the real devkit.
SYNSETS = {1: ("n02119789", "kit fox"), 2: ("n02100735", "English setter"), 3: ("n02110185", "Siberian husky")}
VAL_IDS = [2, 1, 3, 3, 2, 1]  # others when read from the end
TRAIN_COUNT = 5


def jpeg(number: int) -> bytes:
    """A photo that differs by number, 80x60 pixels."""
    photo = np.roll(skimage.data.astronaut(), number * 37, 1)[:60, :80]
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def train_images() -> dict[str, dict[str, bytes]]:
    """WordNet id -> file name -> bytes."""
    names = sorted(name for name, _ in SYNSETS.values())
    return {
        name: {f"{name}_{number}.JPEG": jpeg(10 * row + number) for number in range(TRAIN_COUNT)}
        for row, name in enumerate(names)
    }


def val_images() -> dict[str, bytes]:
    """File name -> bytes; VAL_IDS has their ILSVRC ids in order."""
    return {f"ILSVRC2012_val_{number + 1:08d}.JPEG": jpeg(100 + number) for number in range(len(VAL_IDS))}


def tar_of(files: dict[str, bytes]) -> bytes:
    """A tar as tar(1) makes them, with times and owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_340_000_000, "someone"
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def devkit() -> bytes:
    """The devkit's archive with meta.mat and the ground truth; one row is a parent, as in the real one."""
    rows = [(number, name, words, 0) for number, (name, words) in SYNSETS.items()] + [(4, "n00001740", "entity", 3)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, fields)[:, None]})
    truth = "".join(f"{label}\n" for label in VAL_IDS).encode()
    inner = "ILSVRC2012_devkit_t12/data"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in (
            (f"{inner}/meta.mat", meta.getvalue()),
            (f"{inner}/ILSVRC2012_validation_ground_truth.txt", truth),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_archives(folder: Path) -> Path:
    """The three official archives."""
    folder.mkdir(parents=True, exist_ok=True)
    inner = {f"{name}.tar": tar_of(files) for name, files in train_images().items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val_images()))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    return folder


def write_train_folders(folder: Path) -> None:
    """train/WNID/*.JPEG."""
    for name, files in train_images().items():
        (folder / name).mkdir(parents=True)
        for file, data in files.items():
            (folder / name / file).write_bytes(data)


def write_flat(folder: Path) -> None:
    """val/*.JPEG."""
    folder.mkdir(parents=True)
    for file, data in val_images().items():
        (folder / file).write_bytes(data)


def write_extracted(folder: Path, *, flat_val: bool) -> Path:
    """train/WNID, and val flat with the devkit or in class folders."""
    write_train_folders(folder / "train")
    if flat_val:
        write_flat(folder / "val")
        (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    else:
        for label, (file, data) in zip(VAL_IDS, val_images().items(), strict=True):
            (folder / "val" / SYNSETS[label][0]).mkdir(parents=True, exist_ok=True)
            (folder / "val" / SYNSETS[label][0] / file).write_bytes(data)
    return folder


def write_kaggle(folder: Path) -> Path:
    """ILSVRC/Data/CLS-LOC with Kaggle's two tables."""
    write_train_folders(folder / "ILSVRC/Data/CLS-LOC/train")
    write_flat(folder / "ILSVRC/Data/CLS-LOC/val")
    lines = [
        f"{Path(file).stem},{SYNSETS[label][0]} 1 2 3 4\n" for label, file in zip(VAL_IDS, val_images(), strict=True)
    ]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(lines)))
    mapping = sorted(f"{name} {words}\n" for name, words in SYNSETS.values())
    (folder / "LOC_synset_mapping.txt").write_text("".join(mapping))
    return folder
