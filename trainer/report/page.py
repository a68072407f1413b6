"""HTML pages from templates: page.html.j2 has the frame and the parts that pages share, page.css their look."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from twotower.words import pluralize

SMALL_PX = 96  # images up to this side stay exact (PNG) and are enlarged as squares; larger ones become JPEG


def percent(share: float) -> str:
    """0.973 as ``97.3 %``."""
    return f"{100 * share:.1f} %"


def image_address(image: NDArray[np.uint8]) -> str:
    """A ``data:`` address of an image, uint8 (H, W, 1, 3 or 4): PNG where small or with alpha, else JPEG."""
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    file = io.BytesIO()
    if image.shape[2] == 4 or is_small(image):
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        kind = "png"
    else:
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def is_small(image: NDArray[np.uint8]) -> bool:
    """Whether an image, (H, W, C), is shown with its pixels as squares."""
    return max(image.shape[:2]) <= SMALL_PX


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters |= {"pluralize": pluralize, "percent": percent, "address": image_address}
ENVIRONMENT.tests["small"] = is_small


def render(template: Path, **values: Any) -> str:
    """A page from a template that imports ``page.html.j2``; every value is escaped that is not :class:`Markup`."""
    return ENVIRONMENT.from_string(template.read_text(encoding="utf-8")).render(values).lstrip()


# The parts of page.html.j2 for a page that is put together in Python (trainer/bench/page.py). Body, parts and content
# are HTML; all other arguments are text.
_ui: Any = ENVIRONMENT.get_template("page.html.j2").module
headline, facts, table = _ui.headline, _ui.facts, _ui.table


def page(title: str, body: Iterable[str], *, style: str = "") -> str:
    """A whole document that asks for nothing outside itself; ``style`` is CSS besides page.css."""
    return _ui.page(title, Markup(style), caller=lambda: Markup("\n".join(filter(None, body)))).lstrip()


def header(kicker: str, title: str, lede: str) -> Markup:
    """The head of a page put together in Python; all three are text."""
    words = '<header><p class="kicker">{}</p><h1>{}</h1><p class="lede">{}</p></header>'
    return Markup(words).format(kicker, title, lede)


def section(title: str, *parts: str) -> Markup:
    """A headed part of the page."""
    return _ui.section(title, caller=lambda: Markup("\n".join(filter(None, parts))))


def figure(content: str, caption: str) -> Markup:
    """A figure; the caption's part before its first full stop is set bold."""
    return _ui.figure(Markup(content), caption)


def paragraph(text: str) -> Markup:
    """A paragraph of plain text."""
    return Markup("<p>{}</p>").format(text)
