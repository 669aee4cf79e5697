"""What a notebook shows: progress, escaped text, tables and token heat-maps. Model and dataset text is hostile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from IPython import get_ipython
from IPython.display import HTML

from dense_rlhf.view.escape import esc

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from dense_rlhf.types import Responses

Item = TypeVar("Item")


def is_live() -> bool:
    """Whether a notebook frontend is there that can be asked for input, as every person's can and no batch runner's."""
    try:
        return bool(get_ipython().kernel.get_parent("shell")["content"]["allow_stdin"])
    except (AttributeError, KeyError, TypeError):  # no kernel, or none that runs a cell
        return False


def progress(items: Iterable[Item], label: str = "", seconds: float = 10) -> Iterator[Item]:
    """Yield the items: behind a bar that leaves when done where somebody watches, else printing one line to standard
    error every `seconds`, `label 12/40, 30 s`, which no report is littered by."""
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


def text_table(rows: dict[str, object]) -> HTML:
    """A two-column table of names and values, both escaped; a report takes its caption from the section."""
    body = "".join(
        f"<tr><th scope='row'>{esc(k)}</th><td><code class='mathjax_ignore'>{esc(v)}</code></td></tr>"
        for k, v in rows.items()
    )
    return HTML(f"<table class='mathjax_ignore'>{body}</table>")


def table(frame: pd.DataFrame, caption: str, digits: int = 2) -> HTML:
    """A data frame with a caption, every cell escaped, numbers rounded, missing values as a dash."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "–" if value != value else f"{value:.{digits}f}"
        return esc(value)

    head = "".join(f"<th scope='col'>{esc(name)}</th>" for name in frame.columns)
    rows = ("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in frame.values.tolist())
    return HTML(
        f"<table class='mathjax_ignore'><caption>{esc(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def heatmap(tokens: list[str], values: list[float], label: str, limit: float | None = None) -> str:
    """One line of tokens over blue (below zero) to orange (above), the number in each token's title. HTML, escaped."""
    limit = limit or max((abs(v) for v in values), default=0) or 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        red, green, blue = (230, 159, 0) if value > 0 else (0, 114, 178)
        depth = min(1.0, abs(value) / limit) * 0.8
        spans.append(
            f"<span style='background:rgba({red},{green},{blue},{depth:.2f})' title='{value:+.3f}'>{esc(token)}</span>"
        )
    paper = "white-space:pre-wrap;background:#fff;color:#1b1b1b;padding:.15em .3em"  # legible in light and dark pages
    return (
        f"<tr><th scope='row'>{esc(label)}</th><td><code class='mathjax_ignore' style='{paper}'>"
        f"{''.join(spans)}</code></td></tr>"
    )


def heatmaps(tokens: list[str], credits: dict[str, list[float]], caption: str) -> HTML:
    """One heat-map line for each source over the same tokens; each line has its own colour scale."""
    rows = "".join(heatmap(tokens, values, label) for label, values in credits.items())
    return HTML(
        f"<table class='mathjax_ignore'><caption>{esc(caption)}. Orange adds to the score, blue takes from it; "
        f"hover for the number.</caption>{rows}</table>"
    )


def response_tokens(responses: Responses, row: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token of one response, its EOS too."""
    return [tokenizer.decode([i]) for i in responses.responses[row][responses.mask[row]].tolist()]


def response_heatmaps(
    responses: Responses, row: int, tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Tensor], caption: str
) -> HTML:
    """`heatmaps` of one response; `values` holds a tensor (B, T) for each label."""
    mask = responses.mask[row].cpu()
    lines = {label: tensor[row].cpu()[mask].tolist() for label, tensor in values.items()}
    return heatmaps(response_tokens(responses, row, tokenizer), lines, caption)


def parameters(flat: dict[str, object]) -> HTML:
    """All parameters of a run, folded away."""
    return HTML(f"<details><summary>{len(flat)} parameters</summary>{text_table(flat).data}</details>")


def check(what: str, holds: bool) -> HTML:
    """A named check with its outcome in words."""
    return HTML(f"<p class='mathjax_ignore'><strong>{'holds' if holds else 'DOES NOT HOLD'}</strong>: {esc(what)}</p>")


def note(text: str) -> HTML:
    """A paragraph whose numbers were computed in this run."""
    return HTML(f"<p class='mathjax_ignore'>{esc(text)}</p>")
