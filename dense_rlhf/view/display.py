"""What a notebook shows: progress, text, tables and heat-maps of tokens. Text of models and datasets is escaped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from IPython import get_ipython
from IPython.display import HTML

from dense_rlhf.view.html import part

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from dense_rlhf.types import Responses

Item = TypeVar("Item")


def is_live() -> bool:
    """Whether somebody watches: true in an interactive notebook, false under papermill and outside notebooks."""
    try:
        return bool(get_ipython().kernel.get_parent("shell")["content"]["allow_stdin"])
    except (AttributeError, KeyError, TypeError):  # no kernel, or none that runs a cell
        return False


def progress(items: Iterable[Item], label: str = "", seconds: float = 10) -> Iterator[Item]:
    """Yield the items, with a bar while somebody watches; else with one line on standard error every `seconds`, such as
    `label 12/40, 30 s`, which no report shows."""
    items = items if hasattr(items, "__len__") else list(items)
    if is_live():
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=label, leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= seconds or (done == len(items) and now - start >= seconds):
            last = now
            print(f"{label} {done}/{len(items)}, {now - start:.0f} s", file=sys.stderr, flush=True)


def text_table(rows: Mapping[str, object]) -> HTML:
    """A two-column table of names and values, both escaped; a report takes its caption from the section."""
    return HTML(part("table", "", (), [(name, part("code", value)) for name, value in rows.items()], named=True))


def table(frame: pd.DataFrame, caption: str, digits: int = 2) -> HTML:
    """A data frame with a caption, every cell escaped, numbers rounded, missing values as a dash."""

    def cell(value: object) -> object:
        if isinstance(value, float):
            return "–" if value != value else f"{value:.{digits}f}"
        return value

    return HTML(part("table", caption, list(frame.columns), [map(cell, row) for row in frame.values.tolist()]))


def heat(
    tokens: Sequence[str],
    values: Sequence[float],
    limit: float | None = None,
    half_widths: Sequence[float] | None = None,
) -> Markup:
    """Tokens over blue (below zero) to orange (above), the number in each token's title; full colour at `limit`, by
    default the largest value. With the half widths of their intervals, values whose interval has zero in it are grey.
    Raises ValueError where these differ in number."""
    limit = limit or max((abs(v) for v in values), default=0) or 1.0
    spans = []
    for token, value, half in zip(tokens, values, half_widths or [None] * len(tokens), strict=True):
        hue, depth = "230,159,0" if value > 0 else "0,114,178", min(1.0, abs(value) / limit) * 0.8
        if half is not None and not abs(value) > half:
            hue = "128,128,128"
        number = f"{value:+.3f}" if half is None else f"{value:+.3f} ± {half:.3f}"
        spans.append((token, f"{hue},{depth:.2f}", number))
    return part("heat", spans)


def heat_table(lines: Mapping[str, Markup], caption: str) -> Markup:
    """Heat-maps as a table, a line each."""
    return part("table", caption, (), lines.items(), named=True)


def heatmaps(tokens: Sequence[str], credits: Mapping[str, Sequence[float]], caption: str) -> HTML:
    """One heat-map line for each source over the same tokens; each line has its own colour scale."""
    caption += ". Orange adds to the score, blue takes from it; hover for the number."
    return HTML(heat_table({label: heat(tokens, values) for label, values in credits.items()}, caption))


def response_tokens(responses: Responses, row: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token of one response, its EOS included."""
    return [tokenizer.decode([i]) for i in responses.responses[row][responses.mask[row]].tolist()]


def response_heatmaps(
    responses: Responses, row: int, tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Tensor], caption: str
) -> HTML:
    """`heatmaps` of one response; `values` holds a tensor (B, T) for each label."""
    mask = responses.mask[row].cpu()
    lines = {label: tensor[row].cpu()[mask].tolist() for label, tensor in values.items()}
    return heatmaps(response_tokens(responses, row, tokenizer), lines, caption)


def parameters(flat: Mapping[str, object]) -> HTML:
    """All parameters of a run, folded away."""
    return HTML(part("folded", f"{len(flat)} parameters", text_table(flat).data))


def check(what: str, holds: bool) -> HTML:
    """A named check with its outcome in words."""
    return HTML(part("paragraph", what, "holds" if holds else "DOES NOT HOLD"))


def note(text: str) -> HTML:
    """A paragraph whose numbers were computed in this run."""
    return HTML(part("paragraph", text))
