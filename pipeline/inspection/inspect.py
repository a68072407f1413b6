"""What a data set holds, for people: counts of classes, sizes of the sources, and images to look at."""

import dataclasses
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.config import ImageSettings
from pipeline.errors import DatasetError
from pipeline.files import read_range
from pipeline.inspection.over_shards import over_shards
from pipeline.manifest import STATISTICS_NAME, ImageFormat, Manifest, ShardRecord
from pipeline.preparation.decode import decode
from pipeline.preparation.tar_writer import read_index
from pipeline.sources.tar_reader import TarMember, TarSample
from twotower.words import pluralize

CELL_PX = 112
CAPTION_PX = 14
COLUMNS = 8
STATISTICS_PX = 256
MARGIN_PX, TITLE_PX, ROW_LABEL_PX = 12, 36, 100  # of the picture of the statistics
STEPS = (-3, -2, -1, 0, 1, 2, 3)  # standard deviations along an eigenvector


@dataclasses.dataclass(frozen=True)
class Contents:
    """Figures of one split.

    Attributes:
        classes: samples by label.
        widths_px: (N,) widths in the source.
        heights_px: (N,) heights in the source.
        converted: how often each conversion happened.
    """

    classes: Counter[int]
    widths_px: np.ndarray
    heights_px: np.ndarray
    converted: Counter[str]

    def quantiles(self, percents: Sequence[int]) -> dict[str, list[float]]:
        """Widths, heights and aspects (width / height) of the sources at some percentiles."""
        columns = {"width": self.widths_px, "height": self.heights_px, "aspect": self.widths_px / self.heights_px}
        return {name: np.percentile(values, percents).tolist() for name, values in columns.items()}


@dataclasses.dataclass(frozen=True)
class StoredSample:
    """One sample, read.

    Attributes:
        key: its key.
        shard: the tar it is in.
        image: its image's bytes.
        label: its label.
        about: its JSON.
    """

    key: str
    shard: str
    image: bytes
    label: int
    about: dict[str, object]


def read_contents(folder: Path, manifest: Manifest, split: str) -> Contents:
    """Reads the label and JSON of every sample of a split."""
    shards = manifest.splits[split].shards
    size_bytes = sum(shard.size_bytes for shard in shards)
    found = list(over_shards(_read_shard, (folder, manifest), shards, size_bytes=size_bytes))
    classes, converted = Counter[int](), Counter[str]()
    for each in found:
        classes.update(each.classes)
        converted.update(each.converted)
    widths_px = np.concatenate([each.widths_px for each in found])
    return Contents(classes, widths_px, np.concatenate([each.heights_px for each in found]), converted)


def _read_shard(shared: tuple[Path, Manifest], shard: ShardRecord) -> Contents:
    """The same of one shard."""
    folder, _ = shared
    classes: Counter[int] = Counter()
    converted: Counter[str] = Counter()
    sizes = []
    for sample in read_index(folder / shard.index_name):
        _, label, about = sample.members
        classes[int(_bytes(folder / shard.name, label))] += 1
        row = json.loads(_bytes(folder / shard.name, about))
        sizes.append((row["width"], row["height"]))
        converted.update(filter(None, row["converted"].split("; ")))
    pairs = np.array(sizes, np.int64).reshape(-1, 2)
    return Contents(classes, pairs[:, 0], pairs[:, 1], converted)


def find_sample(folder: Path, manifest: Manifest, key: str) -> StoredSample:
    """Reads one sample by its key.

    Raises:
        DatasetError: there is no such sample.
    """
    for record in manifest.splits.values():
        for shard in record.shards:
            for sample in read_index(folder / shard.index_name):
                if sample.key == key:
                    return _read(folder, shard.name, sample)
    raise DatasetError(f"{folder} has no sample {key}; a key looks like train-00000042")


def spread_samples(folder: Path, manifest: Manifest, split: str, count: int) -> Iterator[StoredSample]:
    """Samples spread evenly over the shards of a split."""
    record = manifest.splits[split]
    wanted = np.unique(np.linspace(0, record.num_samples - 1, count).astype(int)).tolist()
    first = 0
    for shard in record.shards:
        rows = [row - first for row in wanted if first <= row < first + shard.num_samples]
        samples = read_index(folder / shard.index_name) if rows else []
        for row in rows:
            yield _read(folder, shard.name, samples[row])
        first += shard.num_samples


def contact_sheet(samples: list[StoredSample], manifest: Manifest) -> Image.Image:
    """A grid of images with their classes below."""
    rows = -(-len(samples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL_PX + 4) + 4, rows * (CELL_PX + CAPTION_PX + 4) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for number, sample in enumerate(samples):
        left = 4 + number % COLUMNS * (CELL_PX + 4)
        top = 4 + number // COLUMNS * (CELL_PX + CAPTION_PX + 4)
        image = open_image(sample.image, manifest.image).convert("RGB")
        scale = CELL_PX / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        filters = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
        image = image.resize(size, filters[scale < 1])  # enlarged pixels stay visible as pixels
        sheet.paste(image, (left + (CELL_PX - size[0]) // 2, top + (CELL_PX - size[1]) // 2))
        title = manifest.classes[sample.label].title
        draw.text((left + 1, top + CELL_PX), _fitting(font, title), fill="black", font=font)
    return sheet


def open_image(data: bytes, form: ImageFormat) -> Image.Image:
    """A stored image, whatever its encoding, upright: as the loader shows it to the net.

    Raises:
        ImageError: it is damaged.
    """
    if form.encoding == "raw":
        assert form.height_px is not None and form.width_px is not None, "raw images have one size"
        pixels = np.frombuffer(data, np.uint8).reshape(form.height_px, form.width_px, form.channels)
    else:
        settings = ImageSettings(resize_px=None, channels=form.channels, max_pixels=sys.maxsize, max_bytes=sys.maxsize)
        pixels = decode(data, settings).pixels
    return Image.fromarray(pixels[..., 0] if form.channels == 1 else pixels)


def read_statistics(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays of ``statistics.npz``.

    Raises:
        DatasetError: there is none, or it is damaged.
    """
    if STATISTICS_NAME not in manifest.files:
        raise DatasetError(f"{folder} has no train split, so it has no statistics")
    try:
        with np.load(folder / STATISTICS_NAME, allow_pickle=False) as file:
            names = {"num_pictures": "num_images"}  # as every data set that exists has it, and as it is called now
            return {names.get(name, name): file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:  # numpy's own words advise to unpickle it
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is damaged"
        raise DatasetError(f"{folder / STATISTICS_NAME}: {reason}: run prepare again") from None


def draw_statistics(arrays: dict[str, np.ndarray]) -> Image.Image:
    """The mean image (or mean color), and beside it, labelled, the mean color moved along each eigenvector."""
    side, channels = STATISTICS_PX, len(arrays["mean"])
    mean = arrays.get("mean_image")
    left = np.broadcast_to(arrays["mean"], (side, side, channels)) if mean is None else mean
    deviations = np.sqrt(np.maximum(arrays["eigenvalues"], 0))
    steps = np.array(STEPS)[None, :, None]
    colors = arrays["mean"] + steps * (deviations[:, None] * arrays["eigenvectors"].T)[:, None, :]  # (C, 7, C)
    image = Image.new("RGB", (3 * MARGIN_PX + 2 * side + ROW_LABEL_PX, 2 * MARGIN_PX + TITLE_PX + side), "white")
    draw, font = ImageDraw.Draw(image), _font(11)
    top, right = MARGIN_PX + TITLE_PX, 2 * MARGIN_PX + side + ROW_LABEL_PX
    for values, x in ((left, MARGIN_PX), (colors, right)):
        pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        half = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).convert("RGB")
        image.paste(half.resize((side, side), Image.Resampling.NEAREST), (x, top))
    title = f"mean {'color' if mean is None else 'image'} of {pluralize(int(arrays['num_images']), 'image')}"
    draw.text((MARGIN_PX, MARGIN_PX), title, fill="black", font=font)
    draw.text((right, MARGIN_PX), "mean color + deviations along an eigenvector", fill="black", font=font)
    for column, step in enumerate(STEPS):
        center = right + (column + 0.5) * side / len(STEPS)
        draw.text((center, top - 3), f"{step:+d}" if step else "0", fill="black", font=font, anchor="ms")
    for row, deviation in enumerate(deviations):
        y = top + (row + 0.5) * side / channels
        text = f"eigenvector {row + 1}\ndeviation {deviation:.1f}"
        draw.text((right - 6, y), text, fill="black", font=font, anchor="rm", align="right")
    return image


def _read(folder: Path, shard: str, sample: TarSample) -> StoredSample:
    image, label, about = (_bytes(folder / shard, member) for member in sample.members)
    return StoredSample(sample.key, shard, image, int(label), json.loads(about))


def _bytes(tar: Path, member: TarMember) -> bytes:
    return read_range(tar, member.offset, member.size)


def _font(size: int = 10) -> ImageFont.FreeTypeFont:
    """DejaVu Sans out of matplotlib's wheel: Pillow's own font lacks accents."""
    import matplotlib  # only for its font

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _fitting(font: ImageFont.FreeTypeFont, text: str) -> str:
    """As much of a text as fits below an image."""
    text = text.split(",")[0]
    while font.getlength(text) > CELL_PX and len(text) > 1:
        text = text[:-1]
    return text
