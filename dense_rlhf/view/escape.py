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
    if text.isascii() and text.replace("\n", "").isprintable():
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
    rf"(?i)((?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|_(?:pass|pwd|key|auth)){QUOTE}\s*[=:]\s*{QUOTE})"
    r"(?=[^\s\"'<>&,;)]*\d)[^\s\"'<>&,;)]{12,}"
)
BEARER = re.compile(
    rf"(?i)((?:authorization{QUOTE}\s*[=:]\s*{QUOTE}\w+|\bbearer)\s+)(?=[^\s\"'<>&]*\d)[\w.~+/=-]{{8,}}"
)
LOGIN = re.compile(r"(?<=://)[^\s/@:\"'<>&]+(?::[^\s/@\"'<>&]*)?@")
HOMES = re.compile(
    r"(?<![\w.-])(?:/home/[^/\s\"'<>&:]+|/root)(?![\w.-])"
    r"|(?<![\w.-])(?:[A-Za-z]:)?[\\/]+Users[\\/]+"
    r"(?:[^\\/\s\"'<>&:]+(?: [^\\/\s\"'<>&:]+){0,2}(?=[\\/\"'<&]|$)|[^\\/\s\"'<>&:]+)",
    re.M,
)
IMAGES = re.compile(r"(data:image/[\w.+-]+;base64,[A-Za-z0-9+/=]+)")
SECRET_NAMES = re.compile(
    r"(?i)TOKEN|SECRET|PASSW(?:OR)?D|PASSPHRASE|API_?KEY|ACCESS_?KEY|CREDENTIAL|COOKIE|(?:^|_)(?:AUTH|DSN|PAT)(?:_|$)"
    r"|(?:PASS|(?<!^)(?<!^OLD)PWD|(?:^|_)KEY)(?:_|$)"
)


def scrubbed(value: object, root: Path | None = None) -> object:
    """A JSON value whose texts, apart from embedded images, are scrubbed."""
    known = _known(root)

    def clean(value: object) -> object:
        if isinstance(value, str):
            return _scrub(value, known)
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, dict):
            return {
                name: item if name.startswith("image/") and isinstance(item, str) else clean(item)
                for name, item in zip(clean(list(value)), value.values())
            }
        return value

    return clean(value)


def scrub(page: str, root: Path | None = None) -> str:
    """A page without home folders, user names in paths, keys and passwords; paths below `root` become relative.

    Takes text or HTML and leaves embedded images as they are. Of this process's environment it removes the values of
    variables that are named like secrets, whatever they look like.
    """
    return _scrub(page, _known(root))


def _known(root: Path | None) -> list[tuple[str, str]]:
    """Exact strings of this machine, and what replaces them, the longest first."""
    values = {
        word
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name)
        for word in (value, *(word for word in value.split() if len(word) >= 12))  # Bearer and a key, for instance
        if len(word) >= 6
    }
    written = {form for value in values for form in (value, repr(value)[1:-1])}
    secrets = {form: "⟨secret⟩" for value in written for form in (value, html.escape(value))}
    places = {str(Path.home()): "~", sys.prefix: "⟨python⟩"}
    places = {place: shown for place, shown in places.items() if len(Path(place).parts) > 2}  # neither / nor /usr
    known = places | ({f"{root}/": "", str(root): "."} if root else {}) | secrets
    return sorted(known.items(), key=lambda pair: -len(pair[0]))


def _scrub(page: str, known: list[tuple[str, str]]) -> str:
    parts = IMAGES.split(page)
    return "".join(part if i % 2 else _scrub_text(part, known) for i, part in enumerate(parts))


def _scrub_text(text: str, known: list[tuple[str, str]]) -> str:
    for secret, shown in known:
        text = text.replace(secret, shown)
    text = HOMES.sub("~", TOKENS.sub("⟨secret⟩", text))
    text = BEARER.sub(r"\1⟨secret⟩", NAMED.sub(r"\1⟨secret⟩", text))
    text = LOGIN.sub("⟨login⟩@", text)
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
