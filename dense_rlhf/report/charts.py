"""Small figures of the pages, as SVG that takes the page's colours and has alt text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dense_rlhf.report.page import draw
from dense_rlhf.statistics import Interval
from dense_rlhf.view.figures import colour

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, LABELS, VALUES, ROW = 700, 170, 150, 26


def forest(intervals: Mapping[str, Interval], what: str, alone: bool = False) -> Markup | str:
    """A point with its interval for each name, one a line, hollow if it has none; a dotted line at zero.

    `alone` is an SVG file, black on white in any viewer; otherwise the figure of a page.

    Intervals with other numbers that are not finite are left out; without any there is no figure.
    """
    shown = {name: i for name, i in intervals.items() if all(map(math.isfinite, _ends(i)))}
    if not shown:
        return ""
    ends = [end for i in shown.values() for end in _ends(i)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    steps = ticks(low, high)
    low, high = min(low, steps[0]), max(high, steps[-1])
    scale = (WIDTH - LABELS - VALUES) / (high - low)

    def x(value: float) -> float:
        return round(LABELS + (value - low) * scale, 1)

    marks = [(x(step), f"{step:g}", "axis" if step else "zero") for step in steps]
    rows = [_row(name, i, x) | {"y": ROW * (n + 0.5)} for n, (name, i) in enumerate(shown.items())]
    words = f"{what}: " + "; ".join(f"{name} {i}" for name, i in shown.items())
    return draw("forest_file" if alone else "forest", what, words, WIDTH, ROW * len(shown) + 6, marks, rows)


def _ends(interval: Interval) -> tuple[float, ...]:
    return (interval.mean, interval.low, interval.high) if interval.known else (interval.mean,)


def _row(name: str, interval: Interval, x: Callable[[float], float]) -> dict[str, object]:
    hue, ends = colour(name), (x(interval.low), x(interval.high)) if interval.known else ()
    row = {"name": name if len(name) <= 24 else name[:23] + "…", "value": interval, "x": x(interval.mean), "ends": ends}
    return row | {"ink": "currentColor" if hue == "#000000" else hue, "left": LABELS - 12, "right": WIDTH - VALUES + 14}


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, `most` or fewer steps apart."""
    span = max(high - low, 1e-6, 1e-6 * max(abs(low), abs(high)))
    unit = 10 ** math.floor(math.log10(span / most))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]


def spark(values: Sequence[float], what: str) -> Markup | str:
    """A line of numbers the size of a word; nothing for fewer than two."""
    known = [v for v in values if math.isfinite(v)]
    if len(known) < 2:
        return ""
    low, high = min(known), max(known)
    across, up = 80 / (len(known) - 1), 17 / ((high - low) or 1)
    points = [(round(across * i + 1, 1), round(19 - up * (v - low), 1)) for i, v in enumerate(known)]
    return draw("spark", f"{what}, from {known[0]:.2f} to {known[-1]:.2f}", points)
