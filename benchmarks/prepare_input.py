"""What ``prepare_speed.py`` reads: photos of ImageNet's size and quality in archives like the official one."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
from photos import crops

UNIQUE = 2000  # different images; larger archives repeat them
QUALITY = 98  # of the sources: gives about 100 kB, near the 110 kB of ImageNet
CLASSES = 10
IMAGENET_TRAIN = 1_281_167


def unique_images(work: Path) -> list[bytes]:
    """The sources as JPEG bytes; made once."""
    path = work / "unique.npz"
    if not path.exists():
        buffers = []
        for image in crops(UNIQUE, 500, 375):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
            buffers.append(np.frombuffer(buffer.getvalue(), np.uint8))
        np.savez(work / "unfinished.npz", data=np.concatenate(buffers), sizes=[len(row) for row in buffers])
        (work / "unfinished.npz").rename(path)
    with np.load(path) as file:
        ends = np.cumsum(file["sizes"])
        data = file["data"].tobytes()
    return [data[end - size : end] for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]


def write_archives(work: Path, count: int) -> Path:
    """ILSVRC2012_img_train.tar with its inner tars, as the official one; made once a count."""
    folder = work / f"archives-{count}"
    if folder.exists():
        return folder
    images = unique_images(work)
    draft = work / "unfinished"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    with tarfile.open(draft / "ILSVRC2012_img_train.tar", "w", format=tarfile.GNU_FORMAT) as outer:
        for label in range(CLASSES):
            name = f"n{label:08d}"
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for number in range(label, count, CLASSES):
                    add(tar, f"{name}_{number}.JPEG", images[number % len(images)])
            add(outer, f"{name}.tar", inner.getvalue())
    draft.rename(folder)
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Appends one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def extracted(work: Path, count: int) -> Path:
    """The same images as class folders, for the peers."""
    folder = work / f"extracted-{count}"
    if not folder.exists():
        for number, data in enumerate(unique_images(work)[:count]):
            path = folder / f"n{number % CLASSES:08d}" / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def write_headers(folder: Path) -> None:
    """1,000 inner tars with 1,281,167 tiny members in all; made once."""
    draft = folder.with_name("unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    counts = np.full(1000, IMAGENET_TRAIN // 1000)
    counts[: IMAGENET_TRAIN % 1000] += 1
    with tarfile.open(draft / "ILSVRC2012_img_train.tar", "w", format=tarfile.GNU_FORMAT) as outer:
        for label, count in enumerate(counts):
            name = f"n{label:08d}"
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for number in range(count):
                    add(tar, f"{name}_{number}.JPEG", bytes(100))
            add(outer, f"{name}.tar", inner.getvalue())
    draft.rename(folder)
