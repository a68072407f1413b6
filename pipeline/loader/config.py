"""The loader's settings: the ``[data]`` table of a recipe. No DALI, no torch: importable anywhere."""

import dataclasses
from typing import Annotated, Literal

from pipeline.errors import require
from twotower.fields import Limits, check, derived, may_change


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What is done to a stored image before the network sees it, and how the reading is arranged.

    An image x (0..255) becomes ``(crop(x) - mean + color) / std``, float32; in training with
    color noise it is divided by ``color_divisor`` besides.

    Attributes:
        crop_px: side of the square crop, at most the stored image's side: ``model.image_px``. Paper: 224 of 256.
        crop_shared_by: consecutive samples of an epoch that share one crop and mirror draw. 1 is the paper; 32 is the
            original program.
        mirror: probability of a horizontal mirror image in training.
        mean: what is subtracted. ``none``; ``channel``: one number per channel; ``image``: the mean image, cropped and
            mirrored like the image; ``image_center``: always the center crop of the mean image, never mirrored, as
            the original program does.
        normalize: ``none``: pixels stay on 0..255; ``per_channel``: each channel divided by its standard deviation over
            the training set; ``per_image``: each crop brought to mean 0 and deviation 1 over all its values, last of
            all.
        color: PCA color shift in training. ``none``; ``deviation``: along each eigenvector by
            N(0,1) * color_sigma * sqrt(eigenvalue), gray levels of 0..255 (the original program); ``eigenvalue``:
            by N(0,1) * color_sigma * eigenvalue where pixels and eigenvalues are on 0..1 (the paper read literally; on
            0..255 it would be noise of +-1,483 gray levels for ILSVRC), so 255 * eigenvalue_255 / 255**2 gray levels.
            ILSVRC-2012 deviations 121.78, 37.09, 19.72 give steps of 12.2, 3.7, 2.0 (deviation) or 5.8, 0.54, 0.15
            gray levels (eigenvalue) at color_sigma 0.1.
        color_sigma: size of the color shift.
        color_off_epoch: first epoch (0-based) without color shift; -1: never off.
        color_divisor: training images are divided by it while the color noise is on; 1.1 in the original
            program, which thereby brings noisy images to the scale of test images; never applied in testing, nor once
            ``color_off_epoch`` is reached, nor where color is none (or color_sigma 0). ``normalize = "per_image"``
            comes after it and undoes it.
        shuffle: ``epoch``: another order every epoch, the same with any number of replicas (two samples of a batch
            meet again in the next epoch 1.0 times as often as in a perfect shuffle, measured); ``once``: the stored
            order (``prepare`` has shuffled it), every epoch the same batches in the same order, as the original
            program does.
        last_batch: what an epoch's last samples become where they fill no batch. ``drop``: nothing; ``partial``: a
            smaller batch, as in the original program.
        threads: decoding threads of one loader, 0: as many as this process may use cores.
        prefetch: batches prepared ahead. Each costs its float32 images, 77 MB for 128 of 224 px; on a GPU its uint8
            crops, 19 MB.
        decode: of two towers in two processes. ``replicated``: each decodes the whole batch; ``sharded``: each decodes
            half, and they exchange uint8 pixels before the normalization; ``auto``: ``sharded`` where the towers are on
            GPUs that talk directly (NCCL) and the images must be decoded, else ``replicated``.
        hw_decoder_load: share of a batch's JPEGs for the GPU's hardware decoder; -1: measured at start-up. The default
            was the fastest on an H100 (256-px JPEG of quality 90, batch 256, 16 threads; 0: 26,500 images/s, 0.25:
            28,000, 0.5: 23,100, 0.65: 26,200, 0.75: 26,200, 0.85: 17,200, 1: 19,600).
        mmap: tars are mapped into memory. False reads them as files, which suits most network file systems better and
            holds one file descriptor for each shard that this process reads in an epoch.

    Raises:
        ConfigError: a value outside its range, naming field, value and range.
    """

    crop_px: Annotated[int, Limits(1, 65536, unit="px")] = derived(224)
    crop_shared_by: Annotated[int, Limits(1, 1 << 30, unit="samples")] = 1
    mirror: Annotated[float, Limits(0, 1)] = 0.5
    mean: Literal["none", "channel", "image", "image_center"] = "image"
    normalize: Literal["none", "per_channel", "per_image"] = "none"
    color: Literal["none", "eigenvalue", "deviation"] = "none"
    color_sigma: Annotated[float, Limits(0)] = 0.1
    color_off_epoch: Annotated[int, Limits(-1, 1 << 30, unit="epochs")] = -1
    color_divisor: Annotated[float, Limits(above=0)] = 1.0
    shuffle: Literal["epoch", "once"] = "epoch"
    last_batch: Literal["drop", "partial"] = "drop"
    threads: Annotated[int, Limits(0, 1024, unit="threads")] = may_change(0)
    prefetch: Annotated[int, Limits(1, 64, unit="batches")] = may_change(2)
    decode: Literal["auto", "replicated", "sharded"] = "auto"
    hw_decoder_load: Annotated[float, Limits(0, 1, besides=-1, besides_means="to measure it")] = 0.25
    mmap: bool = may_change(True)

    def __post_init__(self) -> None:
        """Checks types and limits, and that no setting stands beside one that would not look at it."""
        check(self, "data", require)
        odd = self.last_batch == "partial" and self.decode == "sharded"
        expected = "'drop' with data.decode = 'sharded'; use decode = 'replicated'"
        require(not odd, "data.last_batch", self.last_batch, expected)
