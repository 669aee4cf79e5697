"""Which source a result depends on: the modules that its code imports, read as syntax, and one hash of them.

Comments, blank lines and docstrings change no hash, so an edit of words repeats no training.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from dense_rlhf.files import cache_root, content_key, file_sha256, read_json, write_json
from dense_rlhf.types import InputError

PACKAGE = Path(__file__).parent
NAME = PACKAGE.name
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def modules() -> dict[str, Path]:
    """The package's modules by dotted name; hidden folders hold none."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if not any(part.startswith(".") for part in parts):
            found[".".join((NAME, *parts)).removesuffix(".__init__")] = path
    return found


def imports(module: str, typing: bool = False) -> frozenset[str]:
    """The modules of this package that one imports: at its top, inside functions, or by a string that names one.

    With `typing`, also what it imports for type checking only.
    """
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return _resolved(_named(tree, typing)) - {module}


def _named(tree: ast.AST, typing: bool = False) -> set[str]:
    """Dotted names that a syntax tree imports, or that its strings may stand for."""
    names: set[str] = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and not typing and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value.partition(":")[0])
        waiting += ast.iter_child_nodes(node)
    return {name for name in names if name.startswith(f"{NAME}.")}


def _resolved(names: Iterable[str]) -> frozenset[str]:
    """The modules that dotted names are, or are attributes of."""
    known = modules()
    return frozenset({name if name in known else name.rpartition(".")[0] for name in names} & known.keys() - {NAME})


def code_key(tree: ast.Module) -> str:
    """Hash of what Python runs: the syntax without comments and docstrings. Takes the docstrings out of `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return content_key(ast.dump(tree))


@cache
def _facts() -> dict[str, tuple[list[str], str]]:
    """What each module names and the hash of its code. Kept on disk by content: parsing all takes a second."""
    store = cache_root() / f"source-{sys.version_info.major}.{sys.version_info.minor}.json"
    digests = {module: file_sha256(path) for module, path in modules().items()}
    known: dict = {}
    with suppress(InputError):  # damaged
        known = read_json(store)
    fresh = {digest: module for module, digest in digests.items() if digest not in known}
    for digest, module in fresh.items():
        tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
        known[digest] = [sorted(_named(tree)), code_key(tree)]
    if fresh:
        with suppress(InputError):  # a read-only home costs a second each time
            write_json(store, {digest: known[digest] for digest in digests.values()}, sealed=True)
    return {module: tuple(known[digest]) for module, digest in digests.items()}


def dependencies(names: Iterable[str]) -> frozenset[str]:
    """Modules with all that they import, directly or not, and the packages that they lie in."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            package = module.rpartition(".")[0]
            waiting += [*_resolved(_facts()[module][0]), *([package] if package != NAME else [])]
    return frozenset(found)


@cache
def source_key(*names: str) -> str:
    """Hash of the code of modules and of all that they import, with their templates, as it was when first asked."""
    found = dependencies(names)
    folders = {modules()[module].parent / "template" for module in found}
    templates = {str(path.relative_to(PACKAGE)): file_sha256(path) for folder in folders for path in folder.glob("*")}
    return content_key([{module: _facts()[module][1] for module in sorted(found)}, templates])


def cell_imports(cells: Iterable[str]) -> frozenset[str]:
    """The package's modules that the code cells of a notebook import. Cells that Python cannot parse import none."""
    names: set[str] = set()
    for cell in cells:
        with suppress(SyntaxError):  # magics
            names |= _named(ast.parse(cell))
    return _resolved(names)
