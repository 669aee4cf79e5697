"""One executed notebook as a page: code folded, figures with words, math as MathML, tables with captions."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from dense_rlhf.report.page import LIMIT, draw
from dense_rlhf.report.pictures import compact, source
from dense_rlhf.report.sanitise import clean, fragment
from dense_rlhf.view.html import escaped, part

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag
    from mistune import Markdown

KINDS = """application/javascript text/html text/markdown image/svg+xml text/vnd.mermaid text/latex image/png image/jpeg
           text/plain""".split()  # of an output a page takes the first that there is; Jupyter's order
MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]+`)|(?<!\\)(?P<mark>\$\$?)(?=\S)(?P<tex>.+?)(?<=\S)(?P=mark)", re.S)
LEARNED = "## What we learned"
HASH = re.compile(r"\b[0-9a-f]{40,64}\b")  # whole in the notebook
ANSI = re.compile(r"\x1b\[.*?[@-~]")  # colours of a terminal
LONGEST = 20_000  # characters of one printed output; the whole is in the notebook
SPARE = 100_000  # characters of a page that are not outputs


def mathml(markdown: str) -> str:
    """Markdown with `$...$` and `$$...$$` as MathML, which browsers draw without scripts; bad LaTeX stays as code."""
    from latex2mathml.converter import convert

    def one(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        try:
            return convert(match["tex"].strip(), display="block" if match["mark"] == "$$" else "inline")
        except Exception:  # the converter raises whatever it meets
            return str(part("code", match["tex"]))

    return MATH.sub(one, markdown)


@dataclass
class Output:
    """What a page shows of an output."""

    kind: str  # stdout, stderr, error, or a MIME type
    value: str  # text, HTML, or the data URI of an image
    alt: str = ""  # of an image
    plain: str = ""  # the same in words


@dataclass
class Cell:
    """A cell whose text and outputs are each in one piece."""

    kind: str  # code, markdown or raw
    source: str
    outputs: list[Output]


def notebook_body(path: Path) -> tuple[Markup, Markup]:
    """An executed notebook as HTML that holds only what `sanitise` lets through, and its table of contents.

    Images that are attached to text cells are left out.
    """
    cells = [_cell(cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    _settle(cells)
    cells = _arranged(cells)
    _gather_messages(cells)
    soup = _drawn(cells)
    clean(soup)
    heads = _dress(soup)
    return Markup(soup), draw("contents", heads)


def _drawn(cells: list[Cell]) -> BeautifulSoup:
    """The cells as a tree; HTML of outputs and text cells is parsed alone, so that it closes in itself."""
    from bs4 import BeautifulSoup

    foreign: list[BeautifulSoup] = []

    def keep(html: str) -> int:
        foreign.append(fragment(html))
        return len(foreign) - 1

    def text(printed: str) -> Markup:
        return escaped(ANSI.sub("", printed), LONGEST)

    html = part("cells", cells, text, keep, _markdown(), template="notebook.html.j2")
    soup = BeautifulSoup(html, "html.parser")
    for place in soup.find_all("slot"):
        place.replace_with(*foreign[int(place.string)].contents)
    return soup


@cache
def _markdown() -> Markdown:
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def heading(self, text: str, level: int, **attrs: object) -> str:
            return super().heading(text, level, **attrs).rstrip()

    plugins = ["strikethrough", "table", "url", "task_lists", "def_list"]
    return mistune.create_markdown(renderer=Renderer(escape=False), plugins=plugins)


# ---------------------------------------------------------------------------------------------------- before: cells


def _cell(cell: dict) -> Cell:
    text, kind = "".join(cell["source"]), cell["cell_type"]
    return Cell(kind, mathml(text) if kind == "markdown" else text, [_output(o) for o in cell.get("outputs", ())])


def _output(output: dict) -> Output:
    if output["output_type"] == "stream":
        return Output(output["name"], overwritten("".join(output["text"])))
    if output["output_type"] == "error":
        return Output("error", "\n".join(output["traceback"]))
    data = {kind: "".join(output["data"][kind]) for kind in KINDS if kind in output["data"]}
    kind, value = next(iter(data.items()), ("", ""))
    alt = output.get("metadata", {}).get(kind, {}).get("alt", "")
    return Output(kind, _uri(kind, value) if kind.startswith("image/") else value, alt, data.get("text/plain", ""))


def _uri(kind: str, image: str) -> str:
    """A notebook's image as a data URI, of a PNG in few bytes."""
    if kind == "image/png":
        return source(compact(image))
    text = base64.b64encode(image.encode()).decode() if kind == "image/svg+xml" else "".join(image.split())
    return f"data:{kind};base64,{text}"


def _settle(cells: list[Cell]) -> None:
    """Take out what shows nothing; a note replaces outputs that would exceed the limit."""
    room = LIMIT - SPARE - sum(len(cell.source) for cell in cells)
    for cell in cells:
        cell.outputs = [output for output in cell.outputs if output.value.strip()]
        for n, output in enumerate(cell.outputs):
            whole = output.kind == "text/html" or output.kind.startswith("image/")
            size = len(output.value) if whole else min(LONGEST, len(output.value))
            if size > room:
                note = f"[{size:,} characters left out to keep this page small; the notebook has them] {output.plain}"
                cell.outputs[n] = Output("stdout", note)
            else:
                room -= size


def _arranged(cells: list[Cell]) -> list[Cell]:
    """What was learned right after the question; code that shows nothing joins the code after it."""
    kinds = [cell.kind for cell in cells]
    begun = kinds.index("code") if "code" in kinds else 0
    learned = [n for n, cell in enumerate(cells) if kinds[n] == "markdown" and cell.source.startswith(LEARNED)]
    if begun and learned and learned[0] > begun:
        run = Cell("markdown", "## The run", [])
        cells = [*cells[:begun], *cells[learned[0] :], run, *cells[begun : learned[0]]]
    arranged: list[Cell] = []
    for cell in cells:
        if arranged and cell.kind == arranged[-1].kind == "code" and not arranged[-1].outputs:
            cell.source = f"{arranged.pop().source}\n\n{cell.source}"
        arranged.append(cell)
    return arranged


def _gather_messages(cells: list[Cell]) -> None:
    """All that was written to stderr in one place, after the last code."""
    texts, last = [], next((cell for cell in reversed(cells) if cell.kind == "code"), None)
    for cell in cells:
        texts += [output.value.rstrip() for output in cell.outputs if output.kind == "stderr"]
        cell.outputs = [output for output in cell.outputs if output.kind != "stderr"]
    if texts and last is not None:
        last.outputs.append(Output("stderr", "\n".join(texts)))


def overwritten(text: str) -> str:
    """What a terminal would finally show: of each line, only the text after the last carriage return."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return "\n".join(line.replace("\x1b[A", "") for line in lines)


# ---------------------------------------------------------------------------------------------------- after: structure


def _dress(soup: BeautifulSoup) -> list[tuple[str, Markup]]:
    """Add missing anchors, captions, header scopes and alt texts; returns anchor and words of each heading."""
    section, seen = "this notebook", Counter()
    for node in list(soup.descendants):
        if node.name in ("h1", "h2", "h3"):
            section = node.get_text()
            name = re.sub(r"\W+", "-", section).strip("-") or "part"
            seen[name] += 1
            node["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
        elif node.name == "table":
            _dress_table(soup, node, section)
        elif node.name == "img" and not node.get("alt", "").strip():
            node["alt"] = f"A figure without a description, in: {section}"
        elif node.name is None and HASH.search(node) and node.find_parent("td"):
            node.replace_with(HASH.sub(lambda whole: f"{whole[0][:12]}…", node))
    return [(head["id"], Markup(head.decode_contents())) for head in soup.find_all("h2")]


def _dress_table(soup: BeautifulSoup, table: Tag, section: str) -> None:
    if not table.caption:
        table.insert(0, soup.new_tag("caption", string=section))
    for cell in table.find_all("th"):
        cell.attrs.setdefault("scope", "col" if cell.find_parent("thead") else "row")
    name = table.caption.get_text()[:120]
    table.wrap(soup.new_tag("div", attrs={"class": "wide", "role": "region", "tabindex": "0", "aria-label": name}))
