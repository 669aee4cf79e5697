"""Small figures of the pages, as SVG that takes the page's colours and has alt text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dense_rlhf.report.page import draw
from dense_rlhf.statistics import Interval
from dense_rlhf.view.figures import colour

if TYPE_CHECKING:
    from markupsafe import Markup

NAMED = 3  # names that a title lists, not counts


class Shape(NamedTuple):
    """Of a figure, in pixels: its width, those of its labels and numbers, the height of a row and of a line of text."""

    width: int
    labels: int  # at least; as wide as the longest label wants
    numbers: int  # too narrow for them: none are written
    row: int
    line: int
    letters: int  # of a label, at most
    letter: float  # width of one
    wrap: int  # characters of a line

    def fitted(self, names: Iterable[str]) -> Shape:
        """With room for these labels."""
        longest = min(max(map(len, names)), self.letters)
        return self._replace(labels=max(self.labels, math.ceil(self.letter * longest + 14)))


PAGE = Shape(700, 200, 150, 26, 0, 36, 6.8, 0)
FILE = Shape(416, 170, 12, 20, 15, 34, 5.6, 62)  # two stand side by side


def forest(intervals: Mapping[str, Interval], what: str, null: float | None = 0.0, alone: bool = False) -> Markup | str:
    """A point with its interval for each name, one a line, hollow if it has none; a dotted line at `null`.

    The title says which intervals lie on which side of `null`, or, without one, which mean is the highest. "method
    (study)" has the method's colour. `alone` is an SVG file, black on white in any viewer, with title and axis written
    in it; otherwise the figure of a page. Intervals with other numbers that are not finite are left out; without any
    there is no figure.
    """
    shown = drawable(intervals)
    if not shown:
        return ""
    shape = (FILE if alone else PAGE).fitted(shown)
    ends = [null or 0.0, *(end for i in shown.values() for end in _ends(i))]
    steps = ticks(min(ends), max(ends))
    low, high = min(*ends, steps[0]), max(*ends, steps[-1])
    scale = (shape.width - shape.labels - shape.numbers) / (high - low)

    def x(value: float) -> float:
        return round(shape.labels + (value - low) * scale, 1)

    marks = [(x(step), f"{step:g}", "axis") for step in steps if step != null]
    marks += [] if null is None else [(x(null), f"{null:g}" if null in steps else "", "zero")]
    title = title_of(shown, null)
    head, foot = (textwrap.wrap(text, shape.wrap) if alone else [] for text in (f"{title}.", what))
    top = shape.line * len(head) + 6 * alone
    rows = [
        _row(name, i, x, shape.letters) | {"y": top + shape.row * (n + 0.5)}
        for n, (name, i) in enumerate(shown.items())
    ]
    bottom = top + shape.row * len(shown) + 6
    box = shape._asdict() | {"top": top, "bottom": bottom, "height": bottom + 24 + shape.line * len(foot)}
    words = f"{title}. {what}: " + "; ".join(f"{name} {i}" for name, i in shown.items())
    drawing = draw("drawing", words, box, head, foot, marks, rows)
    return drawing if alone else draw("forest", title, what, drawing)


def drawable(intervals: Mapping[str, Interval]) -> dict[str, Interval]:
    """Those that a figure can show: finite, or a point without an interval."""
    return {name: i for name, i in intervals.items() if all(map(math.isfinite, _ends(i)))}


def title_of(intervals: Mapping[str, Interval], null: float | None) -> str:
    """Which intervals lie above and below `null`, which hold it; without a `null`, which mean is the highest."""
    if null is None:
        best = max(intervals, key=lambda name: intervals[name].mean)
        return f"Highest: {best}, {intervals[best].mean:.2f}"
    sides: dict[str, list[str]] = {f"above {null:g}": [], f"below {null:g}": [], "unclear": []}
    above, below, unclear = sides.values()
    for name, i in intervals.items():
        (above if i.known and i.low > null else below if i.known and i.high < null else unclear).append(name)
    words = {side: ", ".join(n) if len(n) <= NAMED else f"{len(n)} of {len(intervals)}" for side, n in sides.items()}
    sentence = "; ".join(f"{side}: {words[side]}" for side in sides if words[side])
    return sentence[0].upper() + sentence[1:]


def _ends(interval: Interval) -> tuple[float, ...]:
    return (interval.mean, interval.low, interval.high) if interval.known else (interval.mean,)


def _row(name: str, interval: Interval, x: Callable[[float], float], most: int) -> dict[str, object]:
    hue, ends = colour(name.partition(" (")[0]), (x(interval.low), x(interval.high)) if interval.known else ()
    shown = name if len(name) <= most else name[: most - 1] + "…"
    row = {"name": shown, "value": interval, "x": x(interval.mean), "ends": ends}
    return row | {"ink": "currentColor" if hue == "#000000" else hue}


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
