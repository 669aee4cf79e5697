"""The shell of every page: one that opens from disk, asks for nothing and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.evaluation.claims import IDENTITY, NOT_ASKED
from dense_rlhf.evaluation.rule import NO_DIFFERENCE, SUPPORTED, UNDECIDED
from dense_rlhf.runs import GOOD
from dense_rlhf.view.escape import scrub
from dense_rlhf.view.html import environment, part
from dense_rlhf.view.live import duration

if TYPE_CHECKING:
    from markupsafe import Markup

LIMIT = 500_000  # characters of a page
KINDS = dict.fromkeys((*GOOD, SUPPORTED), "good") | {NO_DIFFERENCE: "even"}  # colour of a word in a frame, else "bad"
KINDS |= dict.fromkeys(("pending", "running", "stale", "cancelled", UNDECIDED, NOT_ASKED, IDENTITY), "idle")
FILES = {"notebook.ipynb": "notebook", "params.yaml": "parameters", "metrics.json": "metrics", "log.txt": "log"}


@cache
def _environment():
    shared = environment()
    shared.globals |= {"KINDS": KINDS, "FILES": FILES, "duration": duration}
    return shared


def draw(name: str, *values: object, **named: object) -> Markup:
    """What the macro `name` of `template/report.html.j2` makes of its arguments."""
    _environment()
    return part(name, *values, template="report.html.j2", **named)


chip, link, table = (partial(draw, name) for name in ("chip", "link", "table"))


def page(
    title: str,
    content: tuple[Markup, Markup],
    footer: str,
    trail: Sequence[tuple[str, str]] = (),
    made_from: str = "",
    root: Path | None = None,
) -> str:
    """A whole HTML page; `content` is its body and table of contents, `trail` the way here as (text, target),
    `made_from` the key of what it was made of; paths below `root` become relative."""
    given = {"title": title, "footer": footer, "trail": trail, "made_from": made_from}
    template = _environment().get_template("page.html.j2")
    return scrub(template.render(given, body=content[0], contents=content[1]), root)


def made_from(path: Path) -> str:
    """The key of what the page at `path` was made of; empty where there is no page."""
    if not path.exists():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        key = re.search(r'<meta name="made-from" content="(\w*)">', file.read(1000))
    return key[1] if key else ""


def sections(title: str, parts: Iterable[tuple[str, str, str]], lead: str = "") -> tuple[Markup, Markup]:
    """Body and table of contents of a page of (anchor, heading, HTML); parts without HTML are left out."""
    kept = [(anchor, head, html) for anchor, head, html in parts if html]
    return draw("body", title, lead, kept), draw("contents", [(anchor, head) for anchor, head, _ in kept])


def times(records: Sequence[Mapping]) -> str:
    """How long runs took, one after another: by the clock, and on the CPU, which other work does not lengthen, where
    every run knows it."""
    clock, cpu = (sum(record.get(name) or 0 for record in records) for name in ("seconds", "cpu_seconds"))
    known = records and all("cpu_seconds" in record for record in records)
    return duration(clock) + (f", {duration(cpu)} of the CPU" if known else "")


def footer(record: Mapping, params: Mapping | None = None, seeds: Sequence[int] = ()) -> Markup:
    """Where a page comes from: status, duration, commit, seeds, hardware, versions and all parameters."""
    seeds = seeds or [record.get("seed", "–")]
    cores = f"{record.get('cores', '?')} {record.get('machine', '')} cores"
    more = [str(record[name]) for name in ("processor", "gpu", "memory") if record.get(name)]
    facts = {
        "run": f"{record.get('job', '')}, {record.get('status', '')} in {times([record])}",
        "commit": record.get("commit", "unknown"),
        "seeds": ", ".join(map(str, seeds)),
        "hardware": ", ".join([cores, *more]),
        "Python": record.get("python", "unknown"),
        "versions": ", ".join(f"{name} {v}" for name, v in (record.get("versions") or {}).items()),
    }
    rows = [(name, part("code", value)) for name, value in (params or {}).items()]
    return draw("footer", facts, table("Resolved parameters of this run", ("parameter", "value"), rows), len(rows))
