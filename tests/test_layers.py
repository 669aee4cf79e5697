"""The import rule: a package imports from those before it in one list, and no files form a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

from dense_rlhf.fingerprint import PACKAGE, imports, modules

ORDER = """types files fingerprint statistics config runs data shaping bayesopt view models attribution ppo
           training evaluation adapters report runner __main__""".split()
ENTRIES = 20  # of the package's folder, so that a newcomer takes it in at a glance
GRAPH = {name: imports(name, typing=True) for name in modules()}
EDGES = [(name, other) for name, others in sorted(GRAPH.items()) for other in sorted(others)]


def box(module):
    """The top-level package or file that a module lies in."""
    return module.split(".")[1] if "." in module else module


def test_every_package_has_its_place():
    assert {box(name) for name in GRAPH} - {"dense_rlhf"} == set(ORDER)
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= ENTRIES


def test_imports_point_to_what_comes_before():
    assert not [
        f"{name} imports {other}"
        for name, other in EDGES
        if box(name) != box(other) and ORDER.index(box(other)) >= ORDER.index(box(name))
    ]


def test_files_form_no_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError


def test_boxes_have_few_arrows():
    assert len({(box(a), box(b)) for a, b in EDGES if box(a) != box(b)}) <= 110


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def parameters(function):
    """How many arguments a caller may have to know."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_functions_are_short_and_take_few_parameters():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{path}: {node.name}"
                assert parameters(node) <= 6, f"{place} takes {parameters(node)} parameters"
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                assert node.end_lineno - first.lineno < 30, f"{place} has {node.end_lineno - first.lineno + 1} lines"


def test_validation_needs_nothing_heavy():
    code = (
        "import sys, dense_rlhf.runner.grid, dense_rlhf.config.study, dense_rlhf.__main__; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pandas', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
