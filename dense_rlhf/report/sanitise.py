"""Only what this list names comes from a notebook's HTML into a page: no script, no style sheet, no request, no form.

Our own outputs are escaped at source (`escape.esc`); this is for what a library, or a careless cell, displays.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dense_rlhf.view.escape import visible

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

TEXT = set(
    """
    a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4
    h5 h6 hr i img ins kbd li mark ol p pre progress q s samp section small span strong sub summary sup table
    tbody td tfoot th thead tr u ul var wbr
    """.split()
)
MATH = set(
    """
    math mfenced mfrac mi mlabeledtr mmultiscripts mn mo mover mpadded mphantom mroot mrow mspace msqrt mstyle
    msub msubsup msup mtable mtd mtext mtr munder munderover
    """.split()
)
DROPPED = set(
    """
    script style template iframe object embed noscript svg title textarea select video audio canvas head link
    meta base annotation annotation-xml
    """.split()
)
KEPT = TEXT | MATH
ATTRIBUTES = set(
    "title lang dir role scope colspan rowspan alt value max open start aria-label aria-hidden headers".split()
)
OURS = {"cell", "code", "error", "messages", "said"}  # classes of this package's own template, which no output may have
MATH_WORDS = set("display mathvariant stretchy fence form columnalign accent separator movablelimits".split())
MATH_LENGTHS = set("lspace rspace linethickness minsize maxsize width".split())
SHORT = r"(?:0|(?:\d|\d?\.\d+)r?em|\d{1,2}(?:\.\d+)?p[xt])"  # none negative, none longer than some lines
SPACE = rf"(?:auto|{SHORT})(?:\s+(?:auto|{SHORT})){{0,3}}"
COLOUR = r"(?:#[0-9a-f]{3,8}|[a-z]+|(?:rgb|hsl)a?\([\d\s.,%]*\))"
BORDER = rf"(?:\dpx|thin|medium)?\s*(?:solid|dashed|dotted|none)?\s*{COLOUR}?"
SIZE = r"(?:[5-9]\d|1\d\d|200)%|0?\.[5-9]\d*r?em|1(?:\.\d+)?r?em|(?:[89]|[1-3]\d)p[xt]|smaller|small|medium|larger?"
WORD = "[a-z]+(?:-[a-z]+)*"
STYLES = (
    dict.fromkeys(("color", "background", "background-color", "accent-color"), COLOUR)
    | dict.fromkeys(("margin", "padding", "padding-left", "gap", "border-radius"), SPACE)
    | dict.fromkeys(("border", "border-left"), BORDER)
    | dict.fromkeys(("width", "max-width"), rf"\d{{1,3}}px|\d{{1,2}}%|100%|auto|{SHORT}")
    | dict.fromkeys(("font-style", "text-align", "vertical-align", "justify-content", "flex-wrap"), WORD)
    | {"font-weight": r"bold|normal|[1-9]00", "font-size": SIZE, "font-variant-numeric": WORD}
    | {"opacity": r"1|0?\.[5-9]\d*", "white-space": "normal|nowrap|pre|pre-wrap|pre-line"}
    | {"display": "block|inline|inline-block|flex|table"}
)  # what cannot reach beyond its own place in the text: no position, no image, nothing huge
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}


def fragment(html: str) -> BeautifulSoup:
    """HTML of an output or a text cell: closed in itself, without classes, not yet clean."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    if "<!" in html or "<?" in html or any(tag.name not in KEPT for tag in soup.find_all(True)):
        clean(soup)
        soup = BeautifulSoup(str(soup), "html.parser")  # texts between which something stood are one
    for tag in soup.find_all(True):
        tag.attrs.pop("class", None)
    return soup


def clean(soup: BeautifulSoup) -> None:
    """Remove from a page's body all that is not on the lists; what is left of a foreign tag is its text."""
    from bs4.element import NavigableString, PreformattedString

    waiting = list(soup.contents)
    while waiting:
        node = waiting.pop()
        if isinstance(node, PreformattedString):  # comments, declarations, processing instructions
            node.extract()
        elif isinstance(node, NavigableString):
            if (shown := visible(node.replace("\t", "    "))) != node:
                node.replace_with(shown)
        elif node.name in DROPPED:
            node.decompose()
        else:
            waiting += node.contents
            _clean_attributes(node) if node.name in KEPT else node.unwrap()


def _clean_attributes(tag: Tag) -> None:
    given = {name: _attribute(tag, name, value) for name, value in tag.attrs.items()}
    tag.attrs = {name: value for name, value in given.items() if value}
    if tag.name == "img" and "src" not in tag.attrs:
        tag.replace_with(f"[image left out: {tag.attrs.get('alt', 'no description')}]")


def _attribute(tag: Tag, name: str, value: object) -> str | None:
    """The attribute as it may stay, None where it may not."""
    value = visible(" ".join(value) if isinstance(value, list) else str(value))
    if name == "class":
        return " ".join(word for word in value.split() if word in OURS)
    if name == "style":
        return ";".join(part.strip() for part in value.split(";") if _harmless(*part.partition(":")[::2]))
    if name == "src":
        return value if tag.name == "img" and re.fullmatch(r"data:image/[\w.+-]+;base64,[\w+/=\s]+", value) else None
    if name == "href":  # pages link to their own parts only
        return value if tag.name == "a" and re.fullmatch(r"#[^\s]+", value) else None
    if name == "id":
        return value if tag.name in HEADINGS else None
    if tag.name in MATH and name in MATH_LENGTHS:
        return value if re.fullmatch(rf"{SHORT}|{WORD}", value) else None
    return value if name in (ATTRIBUTES | MATH_WORDS if tag.name in MATH else ATTRIBUTES) else None


def _harmless(name: str, value: str) -> bool:
    wanted = STYLES.get(name.strip().lower())
    return wanted is not None and re.fullmatch(wanted, value.strip().lower()) is not None
