"""One executed notebook as a page: code folded, figures with words, math as MathML, tables with captions."""

from __future__ import annotations

import base64
import re
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.report.page import LIMIT, draw
from dense_rlhf.report.pictures import compact, source
from dense_rlhf.report.sanitise import clean, fragment
from dense_rlhf.view.html import escaped, part

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag
    from nbformat import NotebookNode

MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]+`)|(?<!\\)(?P<mark>\$\$?)(?=\S)(?P<tex>.+?)(?<=\S)(?P=mark)", re.S)
LEARNED = "## What we learned"
HASH = re.compile(r"\b[0-9a-f]{40,64}\b")  # whole in the notebook
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


def notebook_body(path: Path) -> tuple[Markup, Markup]:
    """An executed notebook as HTML that holds only what `sanitise` lets through, and its table of contents."""
    import nbformat
    from bs4 import BeautifulSoup

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = mathml(cell.source)
    _settle(notebook)
    notebook.cells = _arranged(notebook.cells)
    _gather_messages(notebook.cells)
    soup = BeautifulSoup(_exported(notebook), "html.parser")
    clean(soup)
    heads = _dress(soup)
    return Markup(soup), draw("contents", heads)


def _exported(notebook: NotebookNode) -> str:
    """What `HTMLExporter` makes of a notebook, without its own pass over the HTML: `_dress` does more."""
    from nbconvert.exporters.templateexporter import TemplateExporter
    from nbconvert.filters import Highlight2HTML
    from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter

    exporter, metadata = _exporter(), notebook.metadata
    language = metadata.get("language_info", {})
    lexer = language.get("pygments_lexer", language.get("name"))
    exporter.register_filter("highlight_code", Highlight2HTML(pygments_lexer=lexer, parent=exporter))
    exporter.register_filter("filter_data_type", WidgetsDataTypeFilter(notebook_metadata=metadata, parent=exporter))
    return TemplateExporter.from_notebook_node(exporter, notebook, exporter._init_resources(None))[0]


@cache
def _exporter():
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(extra_template_basedirs=[str(PACKAGE / "report")], template_name="template")
    exporter.register_filter("text_base64", lambda text: base64.b64encode("".join(text).encode()).decode())
    exporter.register_filter("uncut", lambda text: escaped(text, len(text)))
    exporter.register_filter("fragment", fragment)
    exporter.environment.autoescape, exporter.environment.finalize = True, partial(escaped, limit=LONGEST)
    return exporter


# ---------------------------------------------------------------------------------------------------- before: outputs


def _settle(notebook: NotebookNode) -> None:
    """Keep bars as they ended and figures in few bytes; a note replaces outputs that would exceed the limit."""
    room = LIMIT - SPARE - sum(len(cell.source) for cell in notebook.cells)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = overwritten(output.text)
            elif "image/png" in (data := output.get("data", {})):
                data["image/png"] = source(compact(data["image/png"]))
            size = min(LONGEST, len(output.get("text", ""))) + sum(map(_size, output.get("data", {}).items()))
            room -= size
            if room < 0:
                _leave_out(output, size)
                room += size
        cell["outputs"] = [o for o in cell.get("outputs", ()) if o.get("text", "x").strip()]


def _arranged(cells: list[NotebookNode]) -> list[NotebookNode]:
    """What was learned right after the question; code that shows nothing joins the code after it."""
    kinds = [cell.cell_type for cell in cells]
    begun = kinds.index("code") if "code" in kinds else 0
    learned = [n for n, cell in enumerate(cells) if kinds[n] == "markdown" and cell.source.startswith(LEARNED)]
    if begun and learned and learned[0] > begun:
        from nbformat.v4 import new_markdown_cell

        cells = [*cells[:begun], *cells[learned[0] :], new_markdown_cell("## The run"), *cells[begun : learned[0]]]
    arranged: list[NotebookNode] = []
    for cell in cells:
        if arranged and cell.cell_type == arranged[-1].cell_type == "code" and not arranged[-1].outputs:
            cell.source = f"{arranged.pop().source}\n\n{cell.source}"
        arranged.append(cell)
    return arranged


def _gather_messages(cells: list[NotebookNode]) -> None:
    """All that was written to stderr in one place, after the last code."""
    from nbformat.v4 import new_output

    texts, last = [], next((cell for cell in reversed(cells) if cell.cell_type == "code"), None)
    for cell in cells:
        texts += [o.text.rstrip() for o in cell.get("outputs", ()) if o.get("name") == "stderr"]
        cell["outputs"] = [o for o in cell.get("outputs", ()) if o.get("name") != "stderr"]
    if texts and last is not None:
        last.outputs.append(new_output("stream", name="stderr", text="\n".join(texts)))


def overwritten(text: str) -> str:
    """What a terminal would finally show: of each line, only the text after the last carriage return."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return "\n".join(line.replace("\x1b[A", "") for line in lines)


def _size(item: tuple[str, object]) -> int:
    """Characters of one representation in the page; 0 if pages do not show it."""
    kind, data = item
    return len(data) if isinstance(data, str) and (kind.startswith("image/") or kind == "text/html") else 0


def _leave_out(output: NotebookNode, size: int) -> None:
    alt = output.get("data", {}).get("text/plain", "")
    output.pop("metadata", None)
    text = f"[{size:,} characters left out to keep this page small; the notebook has them] {alt}"
    output.clear()
    output.update(output_type="stream", name="stdout", text=text)


# ---------------------------------------------------------------------------------------------------- after: structure


def _dress(soup: BeautifulSoup) -> list[tuple[str, Markup]]:
    """Add missing anchors, captions, header scopes and alt texts; returns anchor and words of each heading."""
    for link in soup.select(":is(h1, h2, h3, h4, h5, h6) > a"):
        if link.get_text() == "¶":  # nbconvert's own
            link.decompose()
    seen: dict[str, int] = {}
    for head in soup.find_all(["h1", "h2", "h3"]):
        name = re.sub(r"\W+", "-", head.get_text()).strip("-") or "part"
        seen[name] = seen.get(name, 0) + 1
        head["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    for table in soup.find_all("table"):
        _dress_table(soup, table)
    for text in soup.find_all(string=HASH):
        if text.find_parent("td"):
            text.replace_with(HASH.sub(lambda found: f"{found[0][:12]}…", text))
    for image in soup.find_all("img"):
        if not image.get("alt", "").strip():
            image["alt"] = f"A figure without a description, in: {_section(image)}"
    return [(head["id"], Markup(head.decode_contents())) for head in soup.find_all("h2")]


def _section(tag: Tag) -> str:
    head = tag.find_previous(["h1", "h2", "h3"])
    return head.get_text() if head else "this notebook"


def _dress_table(soup: BeautifulSoup, table: Tag) -> None:
    if not table.caption:
        table.insert(0, soup.new_tag("caption", string=_section(table)))
    for cell in table.find_all("th"):
        cell.attrs.setdefault("scope", "col" if cell.find_parent("thead") else "row")
    name = table.caption.get_text()[:120]
    table.wrap(soup.new_tag("div", attrs={"class": "wide", "role": "region", "tabindex": "0", "aria-label": name}))
