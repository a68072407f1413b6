"""What a data set holds, for people: counts of classes, sizes of the sources, and images to look at."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.config import ImageSettings
from pipeline.errors import DatasetError, ImageError
from pipeline.files import read_range
from pipeline.inspection.over_shards import over_shards
from pipeline.manifest import Manifest, ShardRecord, path_inside, read_record
from pipeline.preparation.decode import decode
from pipeline.preparation.tar_writer import read_index
from pipeline.sources.tar_reader import TarMember, TarSample
from pipeline.statistics_file import read_statistics_file
from twotower.words import one_line, pluralize, shortened

MAX_PIXELS = 2**29  # of one image that is shown
SMALL_PIXELS = 2**16  # an image of so few costs nothing, whatever the manifest says
CELL_PX = 112
CAPTION_PX = 14
COLUMNS = 8
STATISTICS_PX = 256
MOST_TITLE = 200  # characters that are measured for a caption
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
    folder, manifest = shared
    classes: Counter[int] = Counter()
    converted: Counter[str] = Counter()
    sizes = []
    for sample in stored_samples(folder, shard):
        _, label, about = sample.members
        classes[_label(folder, shard, sample.key, _bytes(folder / shard.name, label), manifest)] += 1
        row = _about(folder, shard, sample.key, _bytes(folder / shard.name, about))
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
            for sample in stored_samples(folder, shard):
                if sample.key == key:
                    return _read(folder, shard, sample, manifest)
    raise DatasetError(f"{folder} has no sample {key}; a key looks like train-00000042")


def spread_samples(folder: Path, manifest: Manifest, split: str, count: int) -> Iterator[StoredSample]:
    """Samples spread evenly over the shards of a split."""
    record = manifest.splits[split]
    wanted = np.unique(np.linspace(0, record.num_samples - 1, count).astype(int)).tolist()
    first = 0
    for shard in record.shards:
        rows = [row - first for row in wanted if first <= row < first + shard.num_samples]
        samples = stored_samples(folder, shard) if rows else []
        for row in rows:
            yield _read(folder, shard, samples[row], manifest)
        first += shard.num_samples


def contact_sheet(samples: list[StoredSample], manifest: Manifest) -> Image.Image:
    """A grid of images with their classes below."""
    rows = -(-len(samples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL_PX + 4) + 4, rows * (CELL_PX + CAPTION_PX + 4) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for number, sample in enumerate(samples):
        left = 4 + number % COLUMNS * (CELL_PX + 4)
        top = 4 + number // COLUMNS * (CELL_PX + CAPTION_PX + 4)
        image = open_image(sample, manifest).convert("RGB")
        scale = CELL_PX / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        filters = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
        image = image.resize(size, filters[scale < 1])  # enlarged pixels stay visible as pixels
        sheet.paste(image, (left + (CELL_PX - size[0]) // 2, top + (CELL_PX - size[1]) // 2))
        title = one_line(manifest.classes[sample.label].title[:MOST_TITLE])
        draw.text((left + 1, top + CELL_PX), _fitting(font, title), fill="black", font=font)
    return sheet


def open_image(sample: StoredSample, manifest: Manifest) -> Image.Image:
    """A stored image, whatever its encoding, upright: as the loader shows it to the net.

    Raises:
        DatasetError: it is damaged, or larger than the manifest says.
    """
    form = manifest.image
    shape = (form.height_px or 0, form.width_px or 0, form.channels)
    sized = shape[0] * shape[1]
    if form.encoding == "raw":
        if len(sample.image) != sized * form.channels:
            raise DatasetError(f"{sample.shard}: sample {sample.key} is no raw image of the data set's size")
        pixels = np.frombuffer(sample.image, np.uint8).reshape(shape)
    else:
        limit = (
            max(sized, SMALL_PIXELS) if sized else min(manifest.settings.get("max_pixels") or MAX_PIXELS, MAX_PIXELS)
        )
        settings = ImageSettings(resize_px=None, channels=form.channels, max_pixels=limit, max_bytes=MAX_PIXELS * 4)
        try:
            pixels = decode(sample.image, settings).pixels
        except ImageError as error:
            raise DatasetError(f"{sample.shard}: sample {sample.key}: {error}") from None
    return Image.fromarray(pixels[..., 0] if form.channels == 1 else pixels)


def read_statistics(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays of ``statistics.npz``.

    Raises:
        DatasetError: there is none, or it is damaged.
    """
    names = {"num_pictures": "num_images"}  # as every data set that exists has it, and as it is called now
    return {names.get(name, name): array for name, array in read_statistics_file(folder, manifest).items()}


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


def stored_samples(folder: Path, shard: ShardRecord) -> list[TarSample]:
    """The samples of a shard, from its index, which is checked against the tar.

    Raises:
        DatasetError: a file of it is missing, or is not what prepare writes.
    """
    tar, index = path_inside(folder, shard.name), path_inside(folder, shard.index_name)
    samples = read_index(index, num_samples=shard.num_samples, tar_bytes=_size(tar))
    if any(len(sample.members) != 3 for sample in samples):
        raise DatasetError(f"{index}: no valid index (a sample has not an image, a label and a description)")
    return samples


def _size(tar: Path) -> int:
    try:
        return tar.stat().st_size
    except OSError as error:
        raise DatasetError(f"{tar} cannot be read ({error.strerror}): run prepare again") from None


def _read(folder: Path, shard: ShardRecord, sample: TarSample, manifest: Manifest) -> StoredSample:
    image, label, about = (_bytes(folder / shard.name, member) for member in sample.members)
    number = _label(folder, shard, sample.key, label, manifest)
    return StoredSample(sample.key, shard.name, image, number, _about(folder, shard, sample.key, about))


def _label(folder: Path, shard: ShardRecord, key: str, text: bytes, manifest: Manifest) -> int:
    if not text.isdigit() or int(text) >= len(manifest.classes):
        expected = f"0 to {len(manifest.classes) - 1:,}"
        raise DatasetError(f"{folder / shard.name}: sample {key} has label {shortened(text)}: expected {expected}")
    return int(text)


def _about(folder: Path, shard: ShardRecord, key: str, text: bytes) -> dict[str, Any]:
    """A sample's description, as prepare writes it."""
    row = read_record(text, dict, f"{folder / shard.name}: the JSON of sample {key}")
    sides = [row.get("width"), row.get("height")]
    if not all(type(side) is int and 0 < side < 2**31 for side in sides) or type(row.get("converted")) is not str:
        raise DatasetError(f"{folder / shard.name}: sample {key} states no size of its image, or no conversions")
    return row


def _bytes(tar: Path, member: TarMember) -> bytes:
    try:
        return read_range(tar, member.offset, member.size)
    except ImageError as error:
        raise DatasetError(f"{tar}: {error}") from None


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
