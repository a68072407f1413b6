"""Real photos for benchmarks, out of the wheels of scikit-image and scikit-learn: crops at many places and scales.

    python benchmarks/photos.py OUTPUT --count 2048 --size 500x375 --quality 95

Nothing is downloaded. Eleven photos give as many different images as are asked for: every one is another crop of
one of them, resized, so detail, contrast and compressed size vary as in a collection.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
SKIMAGE_NAMES = (
    "astronaut.png", "coffee.png", "chelsea.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png", "rocket.jpg",
    "motorcycle_left.png", "motorcycle_right.png",
)  # fmt: skip
SMALLEST_CROP = 0.45  # of the photo's shorter side: below that, enlarging would make images too smooth


def load_photos() -> list[Image.Image]:
    """The photos, RGB."""
    paths = [SKIMAGE / name for name in SKIMAGE_NAMES] + [SKLEARN / "china.jpg", SKLEARN / "flower.jpg"]
    return [Image.open(path).convert("RGB") for path in paths]


def crops(count: int, width_px: int, height_px: int, seed: int = 0) -> Iterator[Image.Image]:
    """``count`` different images of one size."""
    photos = load_photos()
    random = np.random.default_rng(seed)
    for number in range(count):
        yield crop(photos[number % len(photos)], width_px, height_px, random)


def crop(photo: Image.Image, width_px: int, height_px: int, random: np.random.Generator) -> Image.Image:
    """A part of a photo, at a place and a scale by chance, resized."""
    largest = min(photo.width / width_px, photo.height / height_px)
    scale = largest * random.uniform(SMALLEST_CROP, 1.0)
    width, height = width_px * scale, height_px * scale
    left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
    box = (left, top, left + width, top + height)
    return photo.resize((width_px, height_px), Image.Resampling.BICUBIC, box=box)


def write_class_folders(
    output: Path, count: int, *, width_px: int, height_px: int, quality: int, classes: int = 10, seed: int = 0
) -> None:
    """Writes ``OUTPUT/class-NN/NNNNNN.jpg``, 4:2:0."""
    for number, image in enumerate(crops(count, width_px, height_px, seed)):
        folder = output / f"class-{number % classes:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:06d}.jpg", "JPEG", quality=quality, subsampling="4:2:0")


def write_disjoint_crops(output: Path, names: Sequence[str], count: int = 20) -> None:
    """Writes ``OUTPUT/PHOTO/NN.jpg``: a class a photo, its crops cells of a grid, so that no two share a pixel.

    Args:
        output: folder to make.
        names: of the photos, as in scikit-image's and scikit-learn's wheels.
        count: crops of each, at most 20.
    """
    for name in names:
        photo = Image.open(next(p for p in (SKIMAGE / name, SKLEARN / name) if p.exists())).convert("RGB")
        columns, rows = (5, 4) if photo.width >= photo.height else (4, 5)
        width, height = photo.width // columns, photo.height // rows
        folder = output / Path(name).stem
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            x, y = number % columns * width, number // columns * height
            photo.crop((x, y, x + width, y + height)).save(folder / f"{number:02d}.jpg", "JPEG", quality=95)


def prepare_shards(work: Path, count: int, *, val_fraction: float) -> dict[str, Path]:
    """Photos, 256x256, as JPEG (quality 90) and raw shards, made by our own prepare; kept for the next run."""
    source = work / f"photos-{count}"
    if not source.exists():
        write_class_folders(work / "unfinished", count, width_px=256, height_px=256, quality=97)
        (work / "unfinished").rename(source)
    folders = {encoding: work / f"{encoding}-{count}" for encoding in ("jpeg", "raw")}
    for encoding, folder in folders.items():
        command = [sys.executable, "-m", "pipeline", "prepare", "--source", "folder", "--input", str(source)]
        command += ["--output", str(folder), "--resize", "256", "--encoding", encoding]
        command += ["--val-fraction", str(val_fraction), "--shard-size", "256", "--workers", "2"]
        subprocess.run(command, check=True, cwd=ROOT)
    return folders


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--size", default="500x375", metavar="WxH")
    parser.add_argument("--quality", type=int, default=95)
    args = parser.parse_args()
    width_px, height_px = (int(text) for text in args.size.split("x"))
    write_class_folders(args.output, args.count, width_px=width_px, height_px=height_px, quality=args.quality)


if __name__ == "__main__":
    main()
