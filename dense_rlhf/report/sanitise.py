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
ATTRIBUTES = set(
    """
    class title lang dir role scope colspan rowspan alt value max open start aria-label aria-hidden headers
    """.split()
)
MATH_ATTRIBUTES = set(
    """
    display mathvariant stretchy fence form lspace rspace linethickness columnalign accent separator
    movablelimits minsize maxsize width
    """.split()
)
STYLE = re.compile(
    r"\s*(color|background|background-color|font-(?:weight|size|style|variant-numeric)|text-align"
    r"|opacity|white-space|max-width|width|display|flex-wrap|justify-content|gap|margin|padding(?:-left)?"
    r"|border(?:-left|-radius)?|accent-color|vertical-align)\s*:\s*([\w\s#.,%()+-]*)"
)
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}


def clean(soup: BeautifulSoup) -> None:
    """Remove from a page's body all that is not on the lists; what is left of a foreign tag is its text."""
    from bs4.element import PreformattedString

    for text in list(soup.find_all(string=True)):
        if isinstance(text, PreformattedString):  # comments, declarations, processing instructions
            text.extract()
        elif (shown := visible(text.replace("\t", "    "))) != text:
            text.replace_with(shown)
    for tag in soup.find_all(True):
        if tag.decomposed:
            continue
        if tag.name in DROPPED:
            tag.decompose()
        elif tag.name not in TEXT | MATH:
            tag.unwrap()
        else:
            tag.attrs = {name: value for name, given in tag.attrs.items() if (value := _attribute(tag, name, given))}
            if tag.name == "img" and "src" not in tag.attrs:
                tag.replace_with(f"[image left out: {tag.attrs.get('alt', 'no description')}]")


def _attribute(tag: Tag, name: str, value: object) -> str | None:
    """The attribute as it may stay, None where it may not."""
    value = visible(" ".join(value) if isinstance(value, list) else str(value))
    if name == "style":
        return ";".join(found[0] for part in value.split(";") if (found := STYLE.fullmatch(part)) and _plain(found[2]))
    if name == "src":
        return value if tag.name == "img" and re.fullmatch(r"data:image/[\w.+-]+;base64,[\w+/=\s]+", value) else None
    if name == "href":  # pages link to their own parts only
        return value if tag.name == "a" and re.fullmatch(r"#[^\s]+", value) else None
    if name == "id":
        return value if tag.name in HEADINGS else None
    return value if name in (ATTRIBUTES | MATH_ATTRIBUTES if tag.name in MATH else ATTRIBUTES) else None


def _plain(value: str) -> bool:
    """Whether a style's value calls nothing but colours."""
    return all(call in ("rgb", "rgba", "hsl", "hsla") for call in re.findall(r"([\w-]*)\(", value))
