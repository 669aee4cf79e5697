"""Figures of executed notebooks in few bytes: 256 colours, then WebP without loss where that is smaller than PNG."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.report.page import draw
from dense_rlhf.view.html import escaped

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image


def compact(png: str) -> str:
    """A PNG in base64 with a palette of 256 colours, if that is smaller; one that cannot be read stays as it is.

    What it returns, it keeps: a figure of a record is drawn as that of the run.
    """
    from PIL.Image import Quantize

    try:
        figure = _opened(png)
        if figure.mode == "P":
            return png
        small = _encoded(figure.convert("RGBA").quantize(256, Quantize.FASTOCTREE), "png", optimize=True)
    except (OSError, ValueError):
        return png
    return small if len(small) < len(png) else png


def source(png: str) -> str:
    """The data URI of a PNG in base64: as WebP if that is smaller."""
    try:
        webp = _webp(_opened(png))
    except (OSError, ValueError):
        webp = ""
    kind, data = ("webp", webp) if 0 < len(webp) < len(png) else ("png", "".join(png.split()))
    return f"data:image/{kind};base64,{data}"


def thumbnail(notebook: Path, width: int = 420) -> Markup | str:
    """The last figure of an executed notebook, small, with its alt text; nothing if there is none."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [o for cell in cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
        figure = _opened(compact("".join(outputs[-1]["data"]["image/png"]))).convert("RGBA").convert("RGB")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""
    figure.thumbnail((width, width))
    alt = outputs[-1].get("metadata", {}).get("image/png", {}).get("alt") or "a figure of this notebook"
    return draw("picture", source(_encoded(figure.quantize(64), "png", optimize=True)), escaped(alt, 200))


def _opened(png: str) -> Image:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(png)))


def _webp(figure: Image) -> str:
    colours = figure.convert("RGBA")
    opaque = colours.getchannel("A").getextrema() == (255, 255)
    return _encoded(colours.convert("RGB") if opaque else colours, "webp", lossless=True, quality=100, method=4)


def _encoded(figure: Image, kind: str, **how: object) -> str:
    buffer = io.BytesIO()
    figure.save(buffer, kind, **how)
    return base64.b64encode(buffer.getvalue()).decode()
