"""The shell of every page: one that opens from disk, asks for nothing and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from dense_rlhf.report import TEMPLATE
from dense_rlhf.runs import GOOD
from dense_rlhf.view.escape import esc, scrub
from dense_rlhf.view.html import part
from dense_rlhf.view.live import duration

LIMIT = 2_000_000  # characters of a page


@cache
def _template():
    from jinja2 import Template

    return Template((TEMPLATE / "page.html.j2").read_text()), (TEMPLATE / "style.css").read_text()


def page(
    title: str,
    content: tuple[str, str],
    footer: str,
    trail: Sequence[tuple[str, str]] = (),
    made_from: str = "",
    root: Path | None = None,
) -> str:
    """A whole HTML page; `content` is its body and table of contents, `trail` the way here as (text, target),
    `made_from` the key of what it was made of; paths below `root` become relative."""
    template, style = _template()
    links = "".join(f"<li>{link(target, esc(text))}</li>" for text, target in trail)
    parts = {
        "title": title,
        "body": content[0],
        "footer": footer,
        "style": style,
        "trail": links,
        "contents": content[1],
        "made_from": made_from,
    }
    return scrub(template.render(parts), root)


def made_from(path: Path) -> str:
    """The key of what the page at `path` was made of; empty where there is no page."""
    if not path.exists():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        match = re.search(r'<meta name="made-from" content="(\w*)">', file.read(1000))
    return match[1] if match else ""


def link(target: str, html: str) -> str:
    """A link to a file of ours; `html` is what is seen."""
    return f'<a href="{esc(quote(target))}">{html}</a>'


def contents(heads: Iterable[tuple[str, str]]) -> str:
    """A table of contents of (anchor, text that is already HTML)."""
    items = "".join(f'<li><a href="#{esc(anchor)}">{text}</a></li>' for anchor, text in heads)
    return f"<nav class='contents' aria-label='Contents'><h2>Contents</h2><ol>{items}</ol></nav>" if items else ""


def sections(parts: Iterable[tuple[str, str, str]]) -> tuple[str, str]:
    """Body and table of contents of (anchor, heading, HTML); parts without HTML are left out."""
    kept = [part for part in parts if part[2]]
    body = "".join(f"<section><h2 id='{esc(anchor)}'>{esc(head)}</h2>{html}</section>" for anchor, head, html in kept)
    return body, contents((anchor, esc(head)) for anchor, head, _ in kept)


def chip(status: object, note: str = "") -> str:
    """A status as a word in a coloured frame."""
    kind = "good" if status in GOOD else "idle" if status in ("pending", "running", "stale", "cancelled") else "bad"
    return f"<span class='chip {kind}'>{esc(status)}{esc(note)}</span>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are already HTML; the first of each row is its header. Wide ones scroll by themselves."""
    drawn = part("table", caption, map(Markup, head), [map(Markup, row) for row in rows], named=True)
    return f"<div class='wide' role='region' tabindex='0' aria-label='{esc(caption)}'>{drawn}</div>"


def footer(record: Mapping, params: Mapping | None = None, seeds: Sequence[int] = ()) -> str:
    """Where a page comes from: status, duration, commit, seeds, hardware, versions and all parameters."""
    seeds = seeds or [record.get("seed", "–")]
    cores = f"{record.get('cores', '?')} {record.get('machine', '')} cores"
    more = [str(record[name]) for name in ("processor", "gpu", "memory") if record.get(name)]
    lines = {
        "run": f"{record.get('job', '')}, {record.get('status', '')} in {duration(record.get('seconds') or 0)}",
        "commit": record.get("commit", "unknown"),
        "seeds": ", ".join(map(str, seeds)),
        "hardware": ", ".join([cores, *more]),
        "Python": record.get("python", "unknown"),
        "versions": ", ".join(f"{name} {v}" for name, v in (record.get("versions") or {}).items()),
    }
    facts = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in lines.items())
    return f"<dl>{facts}</dl>" + (parameters(params) if params else "")


def parameters(flat: Mapping) -> str:
    """All parameters, folded away."""
    rows = ((esc(name), f"<code>{esc(value)}</code>") for name, value in flat.items())
    body = table("Resolved parameters of this run", ("parameter", "value"), rows)
    return f"<details><summary>{len(flat)} parameters</summary>{body}</details>"
