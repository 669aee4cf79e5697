"""Which source a result depends on: the modules that its code imports, read as syntax, and one hash of them.

Comments, blank lines and docstrings change no hash, so an edit of words repeats no training.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from dense_rlhf.files import content_key, file_sha256

PACKAGE = Path(__file__).parent
NAME = PACKAGE.name


@cache
def modules() -> dict[str, Path]:
    """The package's modules by dotted name; hidden folders hold none."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if not any(part.startswith(".") for part in parts):
            found[".".join((NAME, *parts)).removesuffix(".__init__")] = path
    return found


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def imports(module: str, typing: bool = False) -> frozenset[str]:
    """The modules of this package that one imports: at its top, inside functions, or by a string that names one.

    With `typing`, also what it imports for type checking only.
    """
    return _named(_tree(module), typing) - {module}


def _named(tree: ast.AST, typing: bool = False) -> frozenset[str]:
    found: set[str] = set()
    skipped = set() if typing else {inner for node in ast.walk(tree) if _is_typing(node) for inner in ast.walk(node)}
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {_module(f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{NAME}."):
            found |= {_module(node.value.partition(":")[0])}
    return frozenset(found & set(modules()) - {NAME})


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _module(name: str) -> str:
    """The module that a dotted name lies in: itself, or what it is an attribute of."""
    return name if name in modules() else name.rpartition(".")[0]


def dependencies(names: Iterable[str]) -> frozenset[str]:
    """Modules with all that they import, directly or not, and the packages that they lie in."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            package = module.rpartition(".")[0]
            waiting += [*imports(module), *([package] if package != NAME else [])]
    return frozenset(found)


@cache
def source_key(*names: str) -> str:
    """Hash of the code of modules and of all that they import, as it was when first asked."""
    return content_key({module: _code(module) for module in sorted(dependencies(names))})


@cache
def _code(module: str) -> str:
    return code_key(_tree(module))


def code_key(tree: ast.Module) -> str:
    """Hash of what Python runs: the syntax without comments and docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return content_key(ast.dump(tree))


def cell_imports(cells: Iterable[str]) -> frozenset[str]:
    """The package's modules that the code cells of a notebook import. Cells that Python cannot parse import none."""
    return frozenset().union(*(_named(tree) for cell in cells if (tree := _parsed(cell))))


def _parsed(cell: str) -> ast.Module | None:
    try:
        return ast.parse(cell)
    except SyntaxError:  # a cell of magics
        return None


@cache
def package_sha256() -> str:
    """Hash of all of this package, its code and the weights it ships."""
    files = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".safetensors"))
    return content_key([(path.name, file_sha256(path)) for path in files])
