"""Text as HTML, and pages without secrets.

Prompts, completions, tokens, dataset rows, rationales, file names and error messages are all hostile: they reach a page
only through `esc`, which every template calls (`view.html`).
"""

from __future__ import annotations

import getpass
import html
import os
import re
import sys
import unicodedata
from pathlib import Path

# drawn as nothing, though Unicode calls them letters, marks or symbols: fillers, joiners, variation selectors
FILLERS = (int(code, 16) for code in "34f 115f 1160 17b4 17b5 2800 3164 ffa0".split())
BLANK = frozenset(map(chr, (*FILLERS, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
STACK = 4  # marks on one letter; more are written out, so that none hides the line above


def esc(text: object, limit: int = 2000) -> str:
    """Escape for HTML text and attributes; unseen characters are shown, long text ends in an ellipsis."""
    text = str(text)
    return html.escape(visible(text if len(text) <= limit else text[:limit] + "…"), quote=True)


def visible(text: str) -> str:
    """Control, direction, zero-width and other unseen characters as ⟨202e⟩; a newline stays."""
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for c in text:
        kind = unicodedata.category(c)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        unseen = (kind[0] == "C" and c != "\n") or kind in ("Zl", "Zp") or c in BLANK
        shown.append(f"⟨{ord(c):04x}⟩" if unseen or marks > STACK else c)
    return "".join(shown)


# ---------------------------------------------------------------------------------------------------- secrets

QUOTE = r"(?:&#x27;|&#39;|&quot;|[\"'])?"
TOKENS = re.compile(
    r"\b(?:hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|npm_\w{30,}|pypi-[\w-]{40,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.S,
)
NAMED = re.compile(
    rf"(?i)((?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key){QUOTE}\s*[=:]\s*{QUOTE})"
    r"(?=[^\s\"'<>&,;)]*\d)[^\s\"'<>&,;)]{12,}"
)
LOGIN = re.compile(r"(?<=://)[^\s/@:\"'<>&]+(?::[^\s/@\"'<>&]*)?@")
HOMES = re.compile(
    r"(?<![\w.-])(?:/home/[^/\s\"'<>&:]+|/Users/[^/\s\"'<>&:]+|/root)(?![\w.-])"
    r"|\b[A-Za-z]:\\+Users\\+[^\\\s\"'<>&:]+"
)
IMAGES = re.compile(r"(data:image/[\w.+-]+;base64,[A-Za-z0-9+/=]+)")
SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "APIKEY", "API_KEY", "ACCESS_KEY")


def scrub(page: str, root: Path | None = None) -> str:
    """A page without home folders, user names in paths, keys and passwords; paths below `root` become relative.

    Takes text or HTML and leaves embedded images as they are. Of this process's environment it removes the values of
    variables that are named like secrets, whatever they look like.
    """
    known = sorted(_known(root).items(), key=lambda pair: -len(pair[0]))
    parts = IMAGES.split(page)
    return "".join(part if i % 2 else _scrub(part, known) for i, part in enumerate(parts))


def _known(root: Path | None) -> dict[str, str]:
    """Exact strings of this machine, and what replaces them."""
    secrets = {
        html.escape(value): "⟨secret⟩"
        for name, value in os.environ.items()
        if len(value) >= 8 and any(part in name.upper() for part in SECRET_NAMES)
    }
    places = {str(Path.home()): "~", sys.prefix: "⟨python⟩"}
    places = {place: shown for place, shown in places.items() if len(Path(place).parts) > 2}  # neither / nor /usr
    return places | ({f"{root}/": "", str(root): "."} if root else {}) | secrets


def _scrub(text: str, known: list[tuple[str, str]]) -> str:
    for secret, shown in known:
        text = text.replace(secret, shown)
    text = HOMES.sub("~", TOKENS.sub("⟨secret⟩", text))
    text = LOGIN.sub("⟨login⟩@", NAMED.sub(r"\1⟨secret⟩", text))
    return USER.sub("⟨user⟩", text) if USER else text


def _user() -> re.Pattern | None:
    """Where this user's name identifies them: in a path, before a host, after the word user; None for root."""
    try:
        name = re.escape(getpass.getuser())
    except (KeyError, OSError):
        return None
    places = rf"(?<=[/\\\\]){name}(?=[/\\\\])|\b{name}(?=@[\w-])|(?<=user=){name}\b|(?<=user: ){name}\b"
    return None if name == "root" else re.compile(places)


USER = _user()
