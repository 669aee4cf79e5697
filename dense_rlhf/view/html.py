"""HTML from templates, for notebooks and pages: whatever a template is given is escaped, unless it is `Markup`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.view.escape import esc

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = tuple(PACKAGE / box / "template" for box in ("view", "report"))


@cache
def environment() -> Environment:
    """Where templates are found and how they escape: as `esc` does, which also shows what cannot be seen."""
    import jinja2

    strict, loader = jinja2.StrictUndefined, jinja2.FileSystemLoader(TEMPLATES)
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, finalize=escaped)
    made.filters["uncut"] = lambda text: escaped(text, len(text))
    return made


def escaped(value: object, limit: int = 2000) -> Markup:
    """Text as HTML, by `esc`; what is `Markup` already stays."""
    from markupsafe import Markup

    return value if isinstance(value, Markup) else Markup(esc(value, limit))


def part(name: str, *given: object, template: str = "parts.html.j2", **named: object) -> Markup:
    """What one macro of a template makes of its arguments. Raises `jinja2.UndefinedError` for one that it lacks."""
    return getattr(environment().get_template(template).module, name)(*given, **named)
