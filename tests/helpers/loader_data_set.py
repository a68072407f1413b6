"""Small data sets of real photos for the loader's tests, and the same images as PIL reads them from the tars."""

import hashlib
import io
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image

from pipeline.manifest import (
    FORMAT,
    MANIFEST_NAME,
    STATISTICS_NAME,
    ClassRecord,
    ImageFormat,
    Manifest,
    ShardRecord,
    SplitRecord,
    read_manifest,
    write_atomic,
)

NUM_CLASSES = 10
_SKIMAGE = Path(skimage.__file__).parent / "data"
_SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
_PHOTOS = (_SKIMAGE / "astronaut.png", _SKIMAGE / "coffee.png", _SKIMAGE / "chelsea.png", _SKLEARN / "china.jpg")


@cache
def _photos() -> tuple[Image.Image, ...]:
    return tuple(Image.open(path).convert("RGB") for path in _PHOTOS)


def photo_crop(number: int, width: int, height: int, channels: int) -> np.ndarray:
    """Crop ``number`` of a real photo, resized: uint8 (H, W, C)."""
    random = np.random.default_rng(number)
    photo = _photos()[number % len(_PHOTOS)]
    side = int(random.integers(120, min(photo.size) + 1))
    x, y = int(random.integers(0, photo.width - side + 1)), int(random.integers(0, photo.height - side + 1))
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return np.asarray(crop.convert("L" if channels == 1 else "RGB")).reshape(height, width, channels)


def encode(pixels: np.ndarray, encoding: str) -> bytes:
    """Pixels as the bytes of a tar member."""
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    if encoding == "png":
        Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    else:
        Image.fromarray(pixels.squeeze()).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_data_set(
    folder: Path,
    *,
    encoding: str = "jpeg",
    train: int = 24,
    val: int = 10,
    size: tuple[int, int] = (40, 40),
    channels: int = 3,
    shard_size: int = 5,
    flat: bool = False,
) -> Path:
    """Writes a data set in the layout of pipeline.manifest; size is (width, height); flat images have one color."""
    image = ImageFormat(encoding, channels, size[1], size[0])
    splits = {
        "train": _write_split(folder, "train", range(train), shard_size, image, flat),
        "val": _write_split(folder, "val", range(1000, 1000 + val), shard_size, image, flat),
    }
    images = np.stack([pixels for pixels, _ in reference_images(folder, splits["train"], image).values()])
    buffer = io.BytesIO()
    np.savez(buffer, **_statistics(images.astype(np.float64)))
    write_atomic(folder / STATISTICS_NAME, buffer.getvalue())
    files = {
        STATISTICS_NAME: {
            "size_bytes": len(buffer.getvalue()),
            "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        }
    }
    classes = tuple(ClassRecord(str(number), str(number)) for number in range(NUM_CLASSES))
    manifest = Manifest(FORMAT, "test", {}, image, classes, "source", splits, files, train + val)
    write_atomic(folder / MANIFEST_NAME, manifest.to_json().encode())
    return folder


def _write_split(
    folder: Path, split: str, numbers: range, shard_size: int, image: ImageFormat, flat: bool
) -> SplitRecord:
    shards = []
    for shard, first in enumerate(range(0, len(numbers), shard_size)):
        part = numbers[first : first + shard_size]
        samples = [(f"{split}-{number - numbers[0]:08d}", _members(number, image, flat)) for number in part]
        shards.append(_write_shard(folder, f"{split}/{split}-{shard:06d}.tar", samples))
    return SplitRecord(len(numbers), 0, tuple(shards))


def _members(number: int, image: ImageFormat, flat: bool) -> dict[str, bytes]:
    assert image.width_px and image.height_px
    pixels = photo_crop(number, image.width_px, image.height_px, image.channels)
    if flat:
        pixels = np.full_like(pixels, number % 256)
    data = encode(pixels, image.encoding)
    return {image.extension: data, "cls": str(number % NUM_CLASSES).encode(), "json": b"{}"}


def _write_shard(folder: Path, name: str, samples: list[tuple[str, dict[str, bytes]]]) -> ShardRecord:
    buffer = io.BytesIO()
    lines = [f"v1.2 {len(samples)}"]
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            row = []
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                row += [extension, str(tar.offset + 512), str(len(data)), info.name]
                tar.addfile(info, io.BytesIO(data))
            lines.append(" ".join(row))
    tar_bytes, index = buffer.getvalue(), ("\n".join(lines) + "\n").encode()
    hashes = [hashlib.sha256(data).hexdigest() for data in (tar_bytes, index)]
    record = ShardRecord(name, len(samples), len(tar_bytes), hashes[0], len(index), hashes[1])
    write_atomic(folder / record.name, tar_bytes)
    write_atomic(folder / record.index_name, index)
    return record


def reference_images(folder: Path, split: SplitRecord, image: ImageFormat) -> dict[str, tuple[np.ndarray, int]]:
    """Key -> (uint8 (H, W, C) as PIL decodes it, label)."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in split.shards:
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[extension] = file.read()
    return {key: (decode(parts[image.extension], image), int(parts["cls"])) for key, parts in found.items()}


def decode(data: bytes, image: ImageFormat) -> np.ndarray:
    """The bytes of a tar member as PIL sees them: uint8 (H, W, C)."""
    shape = (image.height_px, image.width_px, image.channels)
    if image.encoding == "raw":
        return np.frombuffer(data, np.uint8).reshape(shape)
    opened = Image.open(io.BytesIO(data))
    return np.asarray(opened.convert("L" if image.channels == 1 else "RGB")).reshape(shape)


def _statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    pixels = images.reshape(-1, images.shape[-1])
    covariance = np.atleast_2d(np.cov(pixels.T, bias=True))
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return {
        "mean_image": images.mean(0),
        "mean": pixels.mean(0),
        "covariance": covariance,
        "eigenvalues": eigenvalues[::-1],
        "eigenvectors": eigenvectors[:, ::-1],
        "num_pictures": np.int64(len(images)),
        "num_pixels": np.int64(len(pixels)),
    }


def load_reference(folder: Path, split: str = "train") -> dict[str, tuple[np.ndarray, int]]:
    """Key -> (image, label) of a whole split."""
    manifest = read_manifest(folder)
    return reference_images(folder, manifest.splits[split], manifest.image)


def make_encodings(folder: Path, *encodings: str) -> dict[str, Path]:
    """The same small data set in several encodings: 20 training images, 18x16."""
    return {
        encoding: make_data_set(folder / encoding, encoding=encoding, size=(18, 16), train=20, val=2)
        for encoding in encodings
    }
