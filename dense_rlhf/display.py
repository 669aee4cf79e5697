"""What a notebook shows: progress, escaped text, tables and token heat-maps. Model and dataset text is hostile."""

from __future__ import annotations

import html
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TypeVar

from IPython.display import HTML

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str = "", seconds: float = 10) -> Iterator[Item]:
    """Yield the items, printing one line to standard error every `seconds`: `label 12/40, 30 s`."""
    items = items if hasattr(items, "__len__") else list(items)
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= seconds or (done == len(items) and now - start >= seconds):
            last = now
            print(f"{label} {done}/{len(items)}, {now - start:.0f} s", file=sys.stderr, flush=True)


def esc(text: object, limit: int = 2000) -> str:
    """Escape for HTML; control, direction and zero-width characters are shown, long text is cut with a mark."""
    text = str(text)
    shown = text if len(text) <= limit else text[:limit] + "…"
    visible = (c if c == "\n" or unicodedata.category(c)[0] != "C" else f"⟨{ord(c):04x}⟩" for c in shown)
    return html.escape("".join(visible), quote=True)


def text_table(rows: dict[str, object]) -> HTML:
    """A two-column table of names and values, both escaped."""
    body = "".join(f"<tr><th scope='row'>{esc(k)}</th><td><code class='mathjax_ignore'>{esc(v)}</code></td></tr>"
                   for k, v in rows.items())  # fmt: skip
    return HTML(f"<table>{body}</table>")
