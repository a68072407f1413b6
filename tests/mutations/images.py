"""Images and labels made wrong: crops, color, mean image, views, statistics, the order of labels."""

from collections.abc import Iterator

from tests.mutations import Change

RECIPES = "tests/trainer/test_recipes.py"
DRAWS = "tests/pipeline/loader/test_draws.py"
ORDER = "tests/pipeline/loader/test_order.py"
ORIGINAL = "tests/pipeline/loader/test_original.py"
PIXELS = "tests/pipeline/loader/test_pixels.py"
SHARE = "tests/pipeline/loader/test_share.py"
NET_INPUT = "tests/pipeline/loader/test_net_input.py"
INTERPRETED = "tests/trainer/model/test_kernels_triton.py"
SPLIT = "tests/pipeline/loader/test_split.py"
STATISTICS = "tests/pipeline/preparation/test_statistics.py"
HOSTILE = "tests/pipeline/test_hostile_data.py"
IMAGENET = "tests/pipeline/sources/test_imagenet.py"
FOLDER = "tests/pipeline/sources/test_folder_and_webdataset.py"
LAYOUT = "tests/pipeline/sources/test_layout.py"
LABELS = "tests/pipeline/sources/test_labels.py"
WALK = "tests/pipeline/sources/test_walk.py"
COUNTS = "tests/pipeline/preparation/test_counts.py"
DECODE = "tests/pipeline/preparation/test_decode.py"
IMAGE = "tests/pipeline/preparation/test_image.py"
ORIENTATION = "tests/pipeline/preparation/test_orientation.py"


def of_augmentation() -> Iterator[Change]:
    """pipeline/loader/augmentation.py: crops, mirror images, color, views."""
    yield "crop: last column never", "(self.width_px - config.crop_px + 1)", "(self.width_px - config.crop_px)"
    yield "crop: last row never", "(self.height_px - config.crop_px + 1)", "(self.height_px - config.crop_px)"
    yield (
        "crop: rows of the columns' range",
        "(self.height_px - config.crop_px + 1)",
        "(self.width_px - config.crop_px + 1)",
    )
    yield "crop: x is y", "uniform[:, 1] * (self", "uniform[:, 0] * (self"
    yield "crop: always the middle", "geometry[:, 0] = uniform[:, 0] *", "geometry[:, 0] = 0.5 *"
    yield "mirror: 1 - probability", "uniform[:, 2] < config.mirror", "uniform[:, 2] >= config.mirror"
    yield "mirror: half, whatever the recipe says", "uniform[:, 2] < config.mirror", "uniform[:, 2] < 0.5"
    yield "mirror: goes with x", "uniform[:, 2] < config.mirror", "uniform[:, 0] < config.mirror"
    yield "crop: not shared", "// config.crop_shared_by", "// 1"
    yield "crop: same in all epochs", "self.seed, epoch, _GEOMETRY", "self.seed, 0, _GEOMETRY"
    yield "color: same in all epochs", "self.seed, epoch, _COLOR", "self.seed, 0, _COLOR"
    yield "color: along eigenvalues", "np.sqrt(values) if config.color", "values if config.color"
    yield "color: eigenvalue on 0..255", "values / 255.0", "values"
    yield "color: eigenvalue is deviation", "values / 255.0", "np.sqrt(values)"
    yield "color: sigma", "(config.color_sigma * lengths)", "lengths"
    yield "color: eigenvectors in rows", "statistics.eigenvectors * (", "statistics.eigenvectors.T * ("
    yield "color: rows of the matrix", "normals @ self.steps.T", "normals @ self.steps"
    yield (
        "color: uniform numbers",
        "_normal(_uniform(self.seed, epoch, _COLOR, first, count))",
        "_uniform(self.seed, epoch, _COLOR, first, count)",
    )
    yield "color: deviation of the normal numbers", "np.sqrt(-2.0 *", "np.sqrt(-1.0 *"
    yield "color: ends an epoch late", "config.color_off_epoch <= epoch", "config.color_off_epoch < epoch"
    yield "color: never ends", "and not 0 <= config.color_off_epoch <= epoch", ""
    divisor = "self.config.color_divisor if self.color_is_on(epoch) else 1.0"
    yield "divisor: after the noise, too", divisor, "self.config.color_divisor"
    yield "divisor: missing", divisor, "1.0"
    yield "divisor: 1.1, whatever the recipe says", divisor, "1.1 if self.color_is_on(epoch) else 1.0"
    yield "center: a column off", "[(width_px - crop_px) // 2,", "[(width_px - crop_px) // 2 + 1,"
    yield "center: rounded up", "(height_px - crop_px) // 2, 0]", "(height_px - crop_px + 1) // 2, 0]"
    corners = (
        "(0, 0), (right, 0)",
        "(right, 0), (right // 2",
        "(right // 2, bottom // 2)",
        "(0, bottom),",
        "(right, bottom)]",
    )
    wrong = (
        "(1, 0), (right, 0)",
        "(right, 1), (right // 2",
        "(right // 2, bottom)",
        "(0, bottom - 1),",
        "(0, bottom)]",
    )
    for number, (old, new) in enumerate(zip(corners, wrong, strict=True)):
        yield f"ten views: view {number + 1} elsewhere", old, new
    yield "ten views: none mirrored", "for mirror in (0, 1)", "for mirror in (0, 0)"


def of_graph() -> Iterator[Change]:
    """pipeline/loader/graph.py: what DALI computes."""
    yield "mirror: never by DALI", "mirror=mirror, mean", "mirror=0, mean"
    yield "mirror: never where towers share the decoding", "mirror=mirror, dtype", "mirror=0, dtype"
    yield "scale: not by DALI", "mean=mean, std=std, output", "mean=mean, output"
    yield (
        "crop: x and y swapped for DALI",
        "return x.astype(np.float32), y.astype(np.float32)",
        "return y.astype(np.float32), x.astype(np.float32)",
    )
    yield "ten views: never mirrored by DALI", "mirror=int(mirror)", "mirror=0"
    yield "testing: no mean", "mean=mean.tolist()", "mean=[0.0] * len(mean)"
    yield "testing: no scale", "std=std.tolist()", "std=[1.0] * len(std)"
    yield "crops: whole images", "fn.crop(pixels, **window) if window else", "pixels if window else"
    yield "ten views: one crop for all", "if place not in crops:", "if not crops:"


def of_normalize() -> Iterator[Change]:
    """pipeline/loader/normalize.py: mean, color and scale, by DALI's numbers and by torch."""
    yield "mean image: not divided", " * (1 / std)[:, None, None]  #", "  #"
    yield "mean image: not mirrored", "if mirror:", "if False:"
    yield "mean image: mirrored elsewhere", "- size - x", "- size"
    yield "mean image: center mirrored", "middle if center else", "middle + np.array([0, 0, 1]) if center else"
    yield (
        "mean image: center's row and column swapped",
        "height_px=image.shape[0], width_px=image.shape[1]",
        "height_px=image.shape[1], width_px=image.shape[0]",
    )
    yield "mean image: added", "np.subtract(crop,", "np.add(crop,"
    yield "mean image: aligned instead of center", 'self.config.mean == "image_center"', "False"
    yield "mean image: always the center", 'self.config.mean == "image_center"', "True"
    yield "mean image: divided as the first batch's", "if divisor not in self._mean_images", "if not self._mean_images"
    yield "mean: not of the channels", 'if config.mean == "channel"', "if False"
    yield "scale: not the deviation", 'if config.normalize == "per_channel"', "if False"
    yield "scale: variance", "statistics.std, 1.0)", "statistics.std**2, 1.0)"
    yield "color: subtracted", "self._mean - shift", "self._mean + shift"
    yield "color: not added", "self._mean - shift", "self._mean - 0 * shift"
    yield "divisor: not of the image", "np.tile(self._std * np.float32(divisor)", "np.tile(self._std"
    yield "divisor: not of the mean image", "std, center = self._std * np.float32(divisor)", "std, center = self._std"
    yield "standardize: epsilon", "STANDARDIZE_EPSILON = 1e-3", "STANDARDIZE_EPSILON = 10.0"
    yield "standardize: each channel by itself", "images.mean(dim=(1, 2, 3)", "images.mean(dim=(2, 3)"
    yield "standardize: by the variance", "torch.rsqrt(variance", "torch.reciprocal(variance"
    yield "torch: mean added", "crops - mean", "crops + mean"
    yield "torch: no divisor", ' == "per_channel" or divisor != 1:', ' == "per_channel":'
    yield "torch: no deviation", 'if self.config.normalize == "per_channel" or divisor', "if divisor"


def of_input_rule() -> Iterator[Change]:
    """pipeline/loader/input_rule.py: what a GPU does to crops."""
    yield "GPU: mirror: none", "mirror[:, None] == 1, steps.flip(0), steps", "mirror[:, None] == 1, steps, steps"
    yield "GPU: mean image: not mirrored with the crop", "x[:, None, None] + columns]", "x[:, None, None] + steps]"
    yield "GPU: mean image: x and y swapped", "x, y, mirror = rows", "y, x, mirror = rows"
    yield "GPU: mean image: its corner for its center", "left, top = rule.center", "left, top = 0, 0"
    yield "GPU: color: added twice", "(values - subtracted) * factor", "(values - 2 * subtracted) * factor"
    yield "GPU: standardize: each channel by itself", "values.mean(dim=(1, 2, 3)", "values.mean(dim=(1, 2)"
    yield "GPU: layout: as it came", ".permute(0, 3, 1, 2)", ".permute(0, 3, 1, 2).contiguous()"
    yield "GPU: dtype: always float32", "values.to(rule.dtype)", "values.to(torch.float32)"


def of_net_input() -> Iterator[Change]:
    """pipeline/loader/net_input.py: what it is told."""
    yield "GPU: mean image: under the crop, not its center", 'config.mean == "image_center"', "False"
    yield "GPU: scale: not its inverse", "1 / divided]", "divided]"


def of_triton_input() -> Iterator[Change]:
    """pipeline/loader/triton_input.py: the kernel, by Triton's interpreter."""
    yield "kernel: mirror: pixels, channels too", "LINE - C - within + 2 * channel", "LINE - 1 - within"
    yield "kernel: mean image: not mirrored with the crop", "* WIDTH + x) * C + source", "* WIDTH + x) * C + within"
    yield "kernel: mean image: center mirrored", "line * (WIDTH * C) + within", "line * (WIDTH * C) + source"
    yield "kernel: channels: the first one's for all", "tl.where(channel == other,", "tl.where(channel == -other,"
    yield (
        "kernel: standardize: what is behind the end counts",
        "tl.where(begin + at < SIZE, difference",
        "tl.where(at >= 0, difference",
    )
    yield "kernel: standardize: epsilon", "/ SIZE + EPSILON", "/ SIZE + 1000 * EPSILON"


def of_sharing() -> Iterator[Change]:
    """pipeline/loader/batch.py: who decodes."""
    yield "decode: shared through the host", "return feed.between_gpus and", "return"
    yield "decode: raw images too", 'encoding != "raw" and fits', "fits"
    yield "decode: parts that are not equal", "count % feed.parts == 0 and", ""


def of_batches() -> Iterator[Change]:
    """pipeline/loader/batches.py: what each batch is given."""
    yield (
        "divisor: DALI has none",
        "affine(shift, self._augmentation.divisor(epoch))",
        "affine(shift)",
    )
    yield (
        "divisor: the mean image has none",
        "self._normalizer.finish(images, fed.draws.geometry, divisor)",
        "self._normalizer.finish(images, fed.draws.geometry)",
    )
    yield (
        "divisor: none where towers share the decoding",
        "self._normalizer(images, fed.draws, divisor)",
        "self._normalizer(images, fed.draws)",
    )
    yield (
        "divisor in testing",
        "np.zeros((1, self.channels), np.float32))",
        "np.zeros((1, self.channels), np.float32), self._decoding.config.color_divisor)",
    )
    yield (
        "divisor of the mean image in testing",
        "finish(views, geometry)",
        "finish(views, geometry, self._decoding.config.color_divisor)",
    )
    yield "draws: same for every batch", "first = position * self._order.batch_size + ", "first = "
    yield "draws: same in every epoch", "draw(epoch, first", "draw(0, first"


def of_batch() -> Iterator[Change]:
    """pipeline/loader/batch.py: rows of a replica."""
    yield "replicas: all take the first rows", "slice(part * size, (part + 1) * size)", "slice(0, size)"


def of_order() -> Iterator[Change]:
    """pipeline/loader/order.py: which sample is which row of which batch."""
    yield (
        "order: tars as stored",
        'np.argsort(self._draw(_TARS, 0, len(order.counts)), kind="stable")',
        "np.arange(len(order.counts))",
    )
    yield (
        "order: same in every epoch",
        'f"{self._order.seed} {self._epoch} {purpose}"',
        'f"{self._order.seed} {purpose}"',
    )
    yield "order: same with every seed", 'f"{self._order.seed} {self._epoch} {purpose}"', 'f"{self._epoch} {purpose}"'
    yield "order: stretches begin at their first sample", "(shares * self._lengths).astype(np.int64)", "0 * rows"
    yield (
        "order: blocks of a replica drawn for the first rows",
        "self._draw_rows(_BLOCKS, int(rows[0])",
        "self._draw_rows(_BLOCKS, 0",
    )
    yield "order: inside a block as drawn for the first rows", "block * size + rows.start", "block * size"
    yield "order: block size", "BLOCK = 32", "BLOCK = 16"
    yield "order: the rest's order of other rows' samples", "rest[:, None]", "BLOCK"


def of_statistics() -> Iterator[Change]:
    """pipeline/preparation/statistics.py: mean image and principal axes."""
    yield "covariance: not around the mean", " - mean[first] * mean[second]", ""
    yield "mean image: of one image less", "/ totals.num_images", "/ (totals.num_images - 1)"
    yield "eigenvalues: rising", "-matrix[index][index]", "matrix[index][index]"
    yield "eigenvectors: in rows", "np.array(columns).T.copy()", "np.array(columns)"


def of_imagenet() -> Iterator[Change]:
    """pipeline/sources/imagenet.py: labels."""
    yield (
        "labels: the orders swapped",
        'records if self.label_order == "ilsvrc"',
        'records if self.label_order != "ilsvrc"',
    )
    yield (
        "labels: ilsvrc by default",
        '"alphabetical" if options.label_order == "default"',
        '"ilsvrc" if options.label_order == "default"',
    )
    yield (
        "labels: validation ids from 0",
        "devkit.wordnet_ids[label - 1]",
        "devkit.wordnet_ids[label % len(devkit.wordnet_ids)]",
    )
    yield "labels: validation ids by name", "devkit.wordnet_ids[label - 1]", "sorted(devkit.wordnet_ids)[label - 1]"
    yield (
        "labels: validation images unsorted",
        "images = sorted(images, key=lambda image: image.name)",
        "images = sorted(images, key=lambda image: image.name, reverse=True)",
    )


def of_devkit() -> Iterator[Change]:
    """pipeline/sources/devkit.py: the class table."""
    yield (
        "labels: the kit's classes by WordNet id",
        "Devkit(tuple(row[1] for row in rows)",
        "Devkit(tuple(sorted(row[1] for row in rows))",
    )


def of_index_checks() -> Iterator[Change]:
    """pipeline/index_checks.py: what DALI would believe."""
    yield "index: any place", "if len(wrong):", "if False:"
    yield "index: beyond the tar", "int(begin[-1] + size[-1]) > tar_bytes", "False"
    yield "index: any label", "(sizes[:, 1] > MAX_LABEL_BYTES).any()", "False"


def of_record_checks() -> Iterator[Change]:
    """pipeline/record_checks.py: names and numbers of a manifest."""
    yield "manifest: any shard's name", 'if found is None or not found["folder"]', 'if False and not found["folder"]'
    yield "manifest: any file's name", "_name(name in FILES,", "_name(True,"
    yield "manifest: true is a number", "type(value) is int and low <= value", "isinstance(value, int) and low <= value"


def of_addresses() -> Iterator[Change]:
    """pipeline/addresses.py: protocols."""
    yield "addresses: any protocol", "    if refused:\n", "    if False:\n"
    yield "addresses: chains", "len(links) > 1 and links[0] not in asked", "False"


def of_tar_reader() -> Iterator[Change]:
    """pipeline/sources/tar_reader.py: sizes."""
    yield "tars: sizes with underscores", 'OCTAL = re.compile(rb"[0-7]*")', 'OCTAL = re.compile(rb"[0-7_]*")'


def of_folder() -> Iterator[Change]:
    """pipeline/sources/folder.py."""
    yield "labels: folders in reverse order", "key=os.fsencode)\n", "key=os.fsencode, reverse=True)\n"
    yield "labels: folders in two Unicode forms are two classes", "nfc(printable(entry))", "printable(entry)"
    yield "counts: pictures without a label are forgotten", "walker.tally.add(reasons.NO_LABEL, path", "print(path"


def of_labels() -> Iterator[Change]:
    """pipeline/sources/labels.py."""
    yield "labels: the column after the names", "1 if name_column == 0 else 0", "name_column + 1"
    yield "labels: any of several columns", "numbers == others[1:]", "True"
    yield "labels: the last line wins", "if before != label:", "if False:"
    yield "labels: no header", "return words or all(", "return words and all("


def of_walk() -> Iterator[Change]:
    """pipeline/sources/walk.py."""
    yield "counts: hidden files are forgotten", "self.pass_over(folder, [entry], reasons.HIDDEN, split)", "pass"
    yield "pictures: by their names only", "if found and has_picture_head(found):", "if False:"
    yield "walk: links before the folders themselves", "linked if entry.linked else waiting", "waiting"


def of_plan() -> Iterator[Change]:
    """pipeline/preparation/plan.py."""
    yield "counts: what --limit leaves out is forgotten", "if num_left:", "if False:"
    yield (
        "counts: splits that were not chosen are forgotten",
        "tally.add(reasons.NOT_CHOSEN",
        "print(reasons.NOT_CHOSEN",
    )


def of_orientation() -> Iterator[Change]:
    """pipeline/preparation/orientation.py: which way up."""
    rows = {2: "FFT", 3: "FTT", 4: "FTF", 5: "TFF", 6: "TFT", 7: "TTT", 8: "TTF"}
    words = {"T": "True", "F": "False"}
    for number, row in rows.items():
        right = ", ".join(words[letter] for letter in row)
        for place, what in enumerate(("transposed", "rows", "columns")):
            wrong = [words[letter] for letter in row]
            wrong[place] = "False" if row[place] == "T" else "True"
            yield f"orientation {number}: {what}", f"{number}: ({right})", f"{number}: ({', '.join(wrong)})"
    yield "orientation: XMP wins", "if stated is not None:", "if stated is not None and not xmp:"
    yield "orientation: 8 is none", "1 <= stated <= 8", "1 <= stated < 8"


def of_decode() -> Iterator[Change]:
    """pipeline/preparation/decode.py: levels, and how small a JPEG may be decoded."""
    yield "decode: 16 bits by 7", "np.uint32) >> 8)", "np.uint32) >> 7)"
    yield "decode: a JPEG at once at its size", "2 * settings.resize_px if", "settings.resize_px if"
    yield "decode: a TIFF turned twice", 'already=kind == "TIFF" and', "already=False and"


def of_image() -> Iterator[Change]:
    """pipeline/preparation/image.py: when the source's bytes are kept."""
    yield "kept: another by 4 levels is converted", "<= SAME_LEVELS", "< SAME_LEVELS"
    yield "kept: another by 5 levels is kept", "SAME_LEVELS = 4", "SAME_LEVELS = 200"


def of_loader_config() -> Iterator[Change]:
    """pipeline/loader/config.py: values that recipes leave alone."""
    yield (
        "default: crops shared",
        'crop_shared_by: Annotated[int, Limits(1, 1 << 30, unit="samples")] = 1',
        'crop_shared_by: Annotated[int, Limits(1, 1 << 30, unit="samples")] = 2',
    )
    yield (
        "default: normalize",
        'normalize: Literal["none", "per_channel", "per_image"] = "none"',
        'normalize: Literal["none", "per_channel", "per_image"] = "per_channel"',
    )
    yield (
        "default: color ends",
        'color_off_epoch: Annotated[int, Limits(-1, 1 << 30, unit="epochs")] = -1',
        'color_off_epoch: Annotated[int, Limits(-1, 1 << 30, unit="epochs")] = 5',
    )
    yield (
        "default: divisor",
        "color_divisor: Annotated[float, Limits(above=0)] = 1.0",
        "color_divisor: Annotated[float, Limits(above=0)] = 1.1",
    )
    yield (
        "default: order of images",
        'shuffle: Literal["epoch", "once"] = "epoch"',
        'shuffle: Literal["epoch", "once"] = "once"',
    )
    yield (
        "default: last batch",
        'last_batch: Literal["drop", "partial"] = "drop"',
        'last_batch: Literal["drop", "partial"] = "partial"',
    )


GROUPS = (
    ("pipeline/loader/config.py", (RECIPES,), of_loader_config),
    ("pipeline/loader/augmentation.py", (DRAWS, ORIGINAL, PIXELS), of_augmentation),
    ("pipeline/loader/graph.py", (PIXELS, ORIGINAL, SPLIT, NET_INPUT), of_graph),
    ("pipeline/loader/normalize.py", (PIXELS, ORIGINAL, SPLIT), of_normalize),
    ("pipeline/loader/input_rule.py", (NET_INPUT,), of_input_rule),
    ("pipeline/loader/net_input.py", (NET_INPUT,), of_net_input),
    ("pipeline/loader/triton_input.py", (INTERPRETED,), of_triton_input),
    ("pipeline/loader/batch.py", (NET_INPUT,), of_sharing),
    ("pipeline/loader/batches.py", (ORIGINAL, PIXELS, SPLIT), of_batches),
    ("pipeline/loader/batch.py", (SHARE,), of_batch),
    ("pipeline/loader/order.py", (ORDER,), of_order),
    ("pipeline/preparation/statistics.py", (STATISTICS,), of_statistics),
    ("pipeline/preparation/orientation.py", (ORIENTATION,), of_orientation),
    ("pipeline/preparation/decode.py", (DECODE, ORIENTATION, IMAGE), of_decode),
    ("pipeline/preparation/image.py", (IMAGE, DECODE), of_image),
    ("pipeline/sources/imagenet.py", (IMAGENET,), of_imagenet),
    ("pipeline/sources/devkit.py", (IMAGENET,), of_devkit),
    ("pipeline/index_checks.py", (HOSTILE,), of_index_checks),
    ("pipeline/record_checks.py", (HOSTILE,), of_record_checks),
    ("pipeline/addresses.py", (HOSTILE,), of_addresses),
    ("pipeline/sources/tar_reader.py", (HOSTILE,), of_tar_reader),
    ("pipeline/sources/folder.py", (FOLDER, LAYOUT, LABELS), of_folder),
    ("pipeline/sources/labels.py", (LABELS,), of_labels),
    ("pipeline/sources/walk.py", (WALK, LAYOUT), of_walk),
    ("pipeline/preparation/plan.py", (COUNTS,), of_plan),
)
