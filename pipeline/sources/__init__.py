"""Where images come from. A source lists its images once, on the driver, and reads single ones, on any worker.

A new source is one file with a frozen (picklable) dataclass that inherits :class:`~pipeline.sources.listing.Source`, a
function ``from_options`` that makes it, and one row in :data:`SOURCES`. Nothing heavy is imported to tell their names.
"""

import importlib
from typing import TYPE_CHECKING

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError
from pipeline.files import UrlPath

if TYPE_CHECKING:
    from pipeline.sources.listing import Source

# Name -> module, imported only when asked for, so that one source's packages are not needed by another.
SOURCES = {
    "imagenet": "pipeline.sources.imagenet",
    "folder": "pipeline.sources.folder",
    "cifar10": "pipeline.sources.cifar10",
    "mnist": "pipeline.sources.idx",
    "fashion-mnist": "pipeline.sources.idx",
    "digits": "pipeline.sources.digits",
    "photo-crops": "pipeline.sources.photo_crops",
    "webdataset": "pipeline.sources.webdataset",
}
AT_URLS = ("imagenet", "folder", "webdataset")  # the others are small enough to be copied first


def open_source(options: PrepareOptions) -> "Source":
    """Makes the source that ``options`` name.

    Raises:
        ConfigError: there is no such source, or it lacks an input.
    """
    if options.source not in SOURCES:
        raise ConfigError(f"--source {options.source}: expected one of {', '.join(SOURCES)}")
    if isinstance(options.input, UrlPath) and options.source not in AT_URLS:
        raise ConfigError(f"--input {options.input}: source {options.source} reads local folders; copy its files first")
    module = importlib.import_module(SOURCES[options.source])
    return module.from_options(options)
