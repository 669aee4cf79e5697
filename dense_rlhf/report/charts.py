"""Small figures of the indexes, as SVG in the page: they take its colours and say themselves in words."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from dense_rlhf.statistics import Interval
from dense_rlhf.view.escape import esc
from dense_rlhf.view.figures import colour

WIDTH, LABELS, VALUES, ROW = 700, 170, 150, 26


def forest(intervals: Mapping[str, Interval], what: str) -> str:
    """A point with its interval for each name, one a line, hollow without one; a dotted line at zero.

    What is not finite otherwise is left out.
    """
    known = {
        name: i
        for name, i in intervals.items()
        if math.isfinite(i.mean) and (not i.known or math.isfinite(i.low) and math.isfinite(i.high))
    }
    if not known:
        return ""
    ends = [end for i in known.values() for end in ((i.low, i.high) if i.known else (i.mean,))]
    low, high = min(0.0, *ends), max(0.0, *ends)
    steps = ticks(low, high)
    low, high = min(low, steps[0]), max(high, steps[-1])
    scale = (WIDTH - LABELS - VALUES) / (high - low)

    def x(value: float) -> float:
        return round(LABELS + (value - low) * scale, 1)

    bottom = ROW * len(known) + 6
    lines = "".join(
        f"<line class='{'axis' if t else 'zero'}' x1='{x(t)}' x2='{x(t)}' y1='0' y2='{bottom}'/>"
        f"<text x='{x(t)}' y='{bottom + 16}' text-anchor='middle'>{t:g}</text>"
        for t in steps
    )
    rows = "".join(_row(name, i, x, ROW * n + ROW / 2) for n, (name, i) in enumerate(known.items()))
    words = f"{what}: " + "; ".join(f"{name} {i}" for name, i in known.items())
    return (
        f"<figure><svg viewBox='0 0 {WIDTH} {bottom + 24}' width='{WIDTH}' role='img' aria-label='{esc(words)}'>"
        f"{lines}{rows}</svg><figcaption>{esc(what)}</figcaption></figure>"
    )


def _row(name: str, interval: Interval, x, y: float) -> str:
    hue = colour(name)
    ink = "currentColor" if hue == "#000000" else hue
    shown = name if len(name) <= 24 else name[:23] + "…"
    bar = (
        (
            f"<line x1='{x(interval.low)}' x2='{x(interval.high)}' y1='{y}' y2='{y}' stroke='{ink}' stroke-width='4' "
            f"stroke-linecap='round' stroke-opacity='.55'/>"
        )
        if interval.known
        else ""
    )
    fill = ink if interval.known else "none"
    return (
        f"<text x='{LABELS - 12}' y='{y + 4}' text-anchor='end'>{esc(shown)}</text>{bar}"
        f"<circle cx='{x(interval.mean)}' cy='{y}' r='5' fill='{fill}' stroke='{ink}'/>"
        f"<text x='{WIDTH - VALUES + 14}' y='{y + 4}'>{esc(interval)}</text>"
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, `most` or fewer steps apart."""
    span = max(high - low, 1e-6, 1e-6 * max(abs(low), abs(high)))
    unit = 10 ** math.floor(math.log10(span / most))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]


def spark(values: Sequence[float], what: str) -> str:
    """A line of numbers the size of a word; nothing for fewer than two."""
    known = [v for v in values if math.isfinite(v)]
    if len(known) < 2:
        return ""
    low, high = min(known), max(known)
    points = " ".join(
        f"{round(80 * i / (len(known) - 1) + 1, 1)},{round(19 - 17 * (v - low) / ((high - low) or 1), 1)}"
        for i, v in enumerate(known)
    )
    words = f"{what}, from {known[0]:.2f} to {known[-1]:.2f}"
    return (
        f"<svg viewBox='0 0 82 20' width='82' height='20' role='img' aria-label='{esc(words)}'>"
        f"<polyline class='path' points='{points}'/></svg>"
    )


def thumbnail(notebook: Path, width: int = 420) -> str:
    """The last figure of an executed notebook, small, with its own words; nothing where there is none."""
    from PIL import Image

    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [o for cell in cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
        drawn = Image.open(io.BytesIO(base64.b64decode("".join(outputs[-1]["data"]["image/png"])))).convert("RGB")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""
    drawn.thumbnail((width, width))
    buffer = io.BytesIO()
    drawn.quantize(64).save(buffer, "png", optimize=True)
    alt = outputs[-1].get("metadata", {}).get("image/png", {}).get("alt") or "a figure of this notebook"
    return f"<img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}' alt='{esc(alt, 200)}'>"
