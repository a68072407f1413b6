"""The loader's settings: the ``[data]`` table of a recipe. No DALI, no torch: importable anywhere."""

import dataclasses
import math

from pipeline.errors import require

MAY_CHANGE = {"may_change": True}  # metadata of fields that decide no pixel: a run may go on with another value
CHOICES = {
    "mean": ("none", "channel", "image", "image_center"),
    "normalize": ("none", "per_channel", "per_image"),
    "color": ("none", "eigenvalue", "deviation"),
    "shuffle": ("epoch", "once"),
    "last_batch": ("drop", "partial"),
    "decode": ("replicated", "sharded"),
}


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What is done to a stored image before the network sees it, and how the reading is arranged.

    An image x (0..255) becomes ``(crop(x) - mean + color) / std``, float32; in training with
    color noise it is divided by ``color_divisor`` besides.

    Attributes:
        crop_px: side of the square crop, pixels, >= 1 and at most the stored image's side. Paper: 224 of 256.
        crop_shared_by: consecutive samples of an epoch that share one crop and mirror draw, >= 1.
            1 is the paper; 32 is the original program.
        mirror: probability of a horizontal mirror image in training, 0..1.
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
        color_sigma: size of the color shift, no unit, >= 0.
        color_off_epoch: first epoch (0-based) without color shift; -1: never off.
        color_divisor: training images are divided by it while the color noise is on, > 0; 1.1 in the original
            program, which thereby brings noisy images to the scale of test images; never applied in testing, nor once
            ``color_off_epoch`` is reached, nor where color is none (or color_sigma 0). ``normalize = "per_image"``
            comes after it and undoes it.
        shuffle: ``epoch``: another order every epoch; ``once``: the stored order (``prepare`` has shuffled it), every
            epoch the same batches in the same order, as the original program does.
        last_batch: what an epoch's last samples become where they fill no batch. ``drop``: nothing; ``partial``: a
            smaller batch, as in the original program.
        shuffle_buffer: samples held by the reader to be drawn from at random, >= 1; of ``shuffle = "epoch"``. Costs
            their encoded bytes. With 400,000 samples in tars of 4,000, two samples of a batch meet again in the next
            epoch 85, 14, 2.1 and 1.04 times as often as in a perfect shuffle with buffers of 1,024, 4,096, 16,384 and
            65,536 (measured).
        threads: decoding threads of one loader, 0: as many as this process may use cores.
        prefetch: batches prepared ahead, 1..64. Each costs its float32 images, 77 MB for 128 of 224 px.
        decode: ``replicated``: each tower decodes the whole batch; ``sharded``: each decodes half, and they exchange
            uint8 pixels before the normalization (pays where decoding is the bottleneck and the link is fast).
        hw_decoder_load: share of a batch's JPEGs for the GPU's hardware decoder, 0..1; -1: measured at start-up.
        mmap: tars are mapped into memory. False reads them as files, which suits most network file systems better and
            holds one file descriptor per shard.

    Raises:
        ConfigError: a value outside its range, naming field, value and range.
    """

    crop_px: int = 224
    crop_shared_by: int = 1
    mirror: float = 0.5
    mean: str = "image"
    normalize: str = "none"
    color: str = "none"
    color_sigma: float = 0.1
    color_off_epoch: int = -1
    color_divisor: float = 1.0
    shuffle: str = "epoch"
    last_batch: str = "drop"
    shuffle_buffer: int = 4096
    threads: int = dataclasses.field(default=0, metadata=MAY_CHANGE)
    prefetch: int = dataclasses.field(default=2, metadata=MAY_CHANGE)
    decode: str = "replicated"
    hw_decoder_load: float = 0.65
    mmap: bool = dataclasses.field(default=True, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Checks types and ranges, and that no setting stands beside one that would not look at it."""
        for name, (low, high) in _INTEGER_RANGES.items():
            value = getattr(self, name)
            fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            require(fits, f"data.{name}", value, f"a whole number, {low}..{high}")
        for name in ("mirror", "color_sigma", "color_divisor", "hw_decoder_load"):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            require(fits, f"data.{name}", value, "a finite number")
        require(0 <= self.mirror <= 1, "data.mirror", self.mirror, "a probability, 0..1")
        require(self.color_sigma >= 0, "data.color_sigma", self.color_sigma, "0 or more")
        require(self.color_divisor > 0, "data.color_divisor", self.color_divisor, "more than 0")
        share = self.hw_decoder_load
        require(0 <= share <= 1 or share == -1, "data.hw_decoder_load", share, "0..1, or -1 to measure it")
        require(isinstance(self.mmap, bool), "data.mmap", self.mmap, "true or false")
        for name, choices in CHOICES.items():
            require(getattr(self, name) in choices, f"data.{name}", getattr(self, name), f"one of {', '.join(choices)}")
        unused = self.shuffle == "once" and self.shuffle_buffer != LoaderConfig.shuffle_buffer
        expected = "none beside data.shuffle = 'once', which reads in stored order"
        require(not unused, "data.shuffle_buffer", self.shuffle_buffer, expected)
        odd = self.last_batch == "partial" and self.decode == "sharded"
        expected = "'drop' with data.decode = 'sharded'; use decode = 'replicated'"
        require(not odd, "data.last_batch", self.last_batch, expected)


_INTEGER_RANGES = {
    "crop_px": (1, 65536),
    "crop_shared_by": (1, 1 << 30),
    "color_off_epoch": (-1, 1 << 30),
    "shuffle_buffer": (1, 1 << 30),
    "threads": (0, 1024),
    "prefetch": (1, 64),
}
